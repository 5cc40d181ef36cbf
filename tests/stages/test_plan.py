"""The plan counts weights as the models have them, and bytes as the store will."""

from __future__ import annotations

from pathlib import Path

import pytest

from semalign.config import resolve
from semalign.core.pairing import Pair
from semalign.models.loading import load_config, load_model
from semalign.stages.inputs import load_inputs
from semalign.stages.plan import make_plan, shape_of


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
    assert step.disk == 2 * plan.positions * 48 * 2
    upper = make_plan(config, inputs, None)
    for bound, known in zip(upper.steps, plan.steps, strict=True):
        assert bound.operations >= known.operations
