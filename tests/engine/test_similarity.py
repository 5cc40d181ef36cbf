"""The pairing `cka`: measured on a worker, once, and the same as in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from semalign.config.jobs import Config
from semalign.engine.steps import Steps
from semalign.models.loading import load_model
from semalign.stages.inputs import load_inputs
from semalign.stages.similarity import layer_similarity


def test_cka_pairs_the_most_similar_layers_and_is_measured_once(
    ray_cluster: None, configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("pairing.strategy=cka", "attribution.top_n=2")
    steps = Steps(config, load_inputs(config))
    inputs = steps.inputs
    pairs = steps.pair([0.1, 0.9, 0.2, 0.8, 0.3])  # critical: 1, then 3, from 0
    models = [load_model(path, dtype="float32") for path in (config.teacher, config.student)]
    expected = torch.tensor(
        layer_similarity(
            *models,
            inputs.attribution_teacher,
            inputs.attribution,
            batch_size=config.attribution.batch_size,
        )
    )
    torch.testing.assert_close(torch.tensor(steps.similarity()), expected, atol=1e-5, rtol=0)
    best = expected.argmax(dim=1).tolist()
    found = {pair.student: pair.teacher for pair in pairs}
    assert found[best[1]] == (1,)
    assert set(found) == {best[1], best[3]}
    said = capsys.readouterr().out
    assert "CKA of all layers, 32 examples" in said and "already there" in said
