"""The pairing `cka`: measured on a worker, once, and the same as in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from semalign.artifacts.artifact import Workspace
from semalign.artifacts.local import make_all
from semalign.config.jobs import Config
from semalign.engine.executor import RayExecutor
from semalign.files import write_json
from semalign.methods.method import Transfer
from semalign.models.loading import load_model
from semalign.stages.similarity import Similarity, layer_similarity

CRITICAL = [0.1, 0.9, 0.2, 0.8, 0.3]  # 1, then 3, from 0


def as_scores(folder: Path) -> Mapping[str, Any]:
    """Layer scores that are known, instead of the teacher's own."""
    write_json(folder / "scores.json", {"layer_numbers": "from 0", "scores": CRITICAL})
    return {}


def test_cka_pairs_the_most_similar_layers_and_is_measured_once(
    ray_cluster: None, configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = Transfer.of(configure("pairing.strategy=cka", "attribution.top_n=2"))
    config, inputs, workspace = prepared.config, prepared.inputs, Workspace(prepared.config.work)
    scores, similarity = prepared.first
    assert isinstance(similarity, Similarity)
    assert workspace.ensure(scores, as_scores)
    with RayExecutor(config, workspace) as executor:
        make_all(executor, prepared.first)
        pairs = prepared.recipe(workspace).pairs
        models = [load_model(path, dtype="float32") for path in (config.teacher, config.student)]
        measure = partial(layer_similarity, *models, batch_size=config.attribution.batch_size)
        expected = torch.tensor(measure(inputs.attribution_teacher, inputs.attribution))
        found_cka = similarity.read(executor.make(similarity))
    torch.testing.assert_close(torch.tensor(found_cka), expected, atol=1e-5, rtol=0)
    best = expected.argmax(dim=1).tolist()
    found = {pair.student: pair.teacher for pair in pairs}
    assert found[best[1]] == (1,)
    assert set(found) == {best[1], best[3]}
    first, second = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "CKA of all layers, 32 examples" in line
    ]
    assert "cached" not in first and "cached" in second
