"""The attribution figure's numbers against the stage's, and its drawing."""

from __future__ import annotations

from pathlib import Path

import pytest

from semalign.analysis import FIGURES
from semalign.analysis.attribution import attribution_curves, normalised
from semalign.data.tokens import Tokens
from semalign.models.loading import load_model
from semalign.stages.attribution import attribution_scores
from tests.analysis.figure_data import (
    attribution_data,
    lines,
    short,
)


def test_attribution_has_a_curve_a_granularity_and_aggregation(
    family: dict[str, Path], tokens: list[Tokens]
) -> None:
    few = short(tokens)
    model = load_model(family["teacher"])
    curves = attribution_curves(model, few, batch_size=2)["curves"]
    assert len({(curve["granularity"], curve["aggregation"]) for curve in curves}) == 6
    for curve in curves:
        how = {name: curve[name] for name in ("granularity", "aggregation")}
        expected = attribution_scores(model, few, batch_size=2, **how)
        assert curve["scores"] == pytest.approx(expected)
        total = sum(abs(score) for score in expected)
        assert curve["share"] == pytest.approx([score / total for score in expected])
        top = max(range(5), key=lambda layer: abs(expected[layer]))
        assert curve["critical"] == top + 1
    signed = next(c for c in curves if (c["granularity"], c["aggregation"]) == ("block", "sum"))
    # the final norm takes the scale away, so no gradient lies along the last layer's output
    assert abs(signed["share"][-1]) < 1e-2
    assert normalised([0.0, 0.0]) == [0.0, 0.0]


def test_attribution_fills_the_critical_layer() -> None:
    figure = FIGURES["attribution"].draw(attribution_data())
    for axes in figure.axes:
        assert lines(axes).count(([1, 2, 3], [1 / 6, -0.5, 1 / 3])) == 3
        assert lines(axes).count(([2], [-0.5])) == 3
    assert figure.axes[0].get_legend_handles_labels()[1] == ["block", "attn", "mlp"]
