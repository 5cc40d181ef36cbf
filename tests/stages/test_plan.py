"""The plan counts weights as the models have them, and bytes as the store will."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from semalign.config.read import resolve
from semalign.core.pairing import Pair
from semalign.models.loading import load_config, load_model
from semalign.stages.costs import column_bytes, shape_of, stored_rows
from semalign.stages.inputs import load_inputs
from semalign.stages.plan import make_plan


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_weights_are_counted(family: dict[str, Path], name: str) -> None:
    shape = shape_of(load_config(family[name]))
    model = load_model(family[name], dtype="float32")
    norm = shape.width
    assert shape.weights + norm == sum(p.numel() for p in model.parameters())


def test_known_pairs_give_the_bytes_of_their_columns(family: dict[str, Path]) -> None:
    config = resolve(
        [], [f"teacher={family['teacher']}", f"student={family['student']}", "data.train_limit=20"]
    )
    inputs = load_inputs(config)
    plan = make_plan(config, inputs, (Pair((1, 2), (0.5, 0.5), 2),))
    [step] = [step for step in plan.steps if step.name == "extract"]
    rows = stored_rows(inputs.train, "all")
    assert sum(rows) == plan.positions
    assert step.disk == 2 * column_bytes(rows, config.extraction.shard_examples, 48, "bfloat16")
    upper = make_plan(config, inputs, None)
    for bound, known in zip(upper.steps, plan.steps, strict=True):
        assert bound.operations >= known.operations


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        ([], 0),
        (["loss.gamma=1"], 1),
        (["loss.objective=fisher"], 1),
        (["loss.objective=fisher", "loss.gamma=1"], 2),
    ],
)
def test_the_teachers_logits_are_counted(
    family: dict[str, Path], overrides: list[str], terms: int
) -> None:
    """A row's logits of both models, made twice, and one gradient; the teacher's head in memory."""
    models = [f"teacher={family['teacher']}", f"student={family['student']}"]
    limit = ["data.train_limit=20", "training.epochs=1"]
    pair = (Pair((1,), (1.0,), 2),)

    def train(*more: str) -> tuple[float, int, int]:
        config = resolve([], [*models, *limit, *more])
        plan = make_plan(config, load_inputs(config), pair)
        [step] = [step for step in plan.steps if step.name == "train"]
        return step.operations, step.memory, plan.positions

    operations, memory, rows = train(*overrides)
    plain = train()
    vocabulary, ours, theirs = 640, 32, 48
    logits = rows * vocabulary * (4 * (ours + theirs) + 2 * ours)
    assert operations - plain[0] == terms * logits
    assert memory - plain[1] == (4 * vocabulary * theirs if terms else 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 9, 10, 333, 4096])
def test_a_column_has_the_size_of_its_files(tmp_path: Path, dtype: str, rows: int) -> None:
    for width in (1, 48, 192):
        sizes = []
        for index, count in enumerate((rows, rows, 1)):
            file = tmp_path / f"{index}.safetensors"
            save_file({"rows": torch.zeros((count, width), dtype=getattr(torch, dtype))}, file)
            sizes.append(file.stat().st_size)
        assert column_bytes([rows, rows, 1], 1, width, dtype) == sum(sizes)
