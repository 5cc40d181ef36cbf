"""The loss curve shows the terms that a run has, whichever they are."""

from __future__ import annotations

import pytest

from semalign.report.figures import loss_curve

STEPS = {"loss": [3.0, 2.0], "lr": [1e-3, 1e-3]}


@pytest.mark.parametrize(
    ("terms", "labels"),
    [
        (["cross_entropy"], {"cross-entropy", "total"}),
        (["cosine_loss", "cross_entropy"], {"cross-entropy", "total", "cosine (right)"}),
        (["geometry_loss", "kl_divergence"], {"KL", "total", "geometry (right)"}),
        (["fisher_loss"], {"total", "fisher (right)"}),
    ],
)
def test_the_loss_curve_has_a_line_a_term(terms: list[str], labels: set[str]) -> None:
    figure = loss_curve({**STEPS, **{term: [1.0, None] for term in terms}})
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    assert {line.get_label() for line in lines} == labels
    assert len(figure.axes) == 1 + any("(right)" in label for label in labels)
    for line in lines:
        assert len(line.get_ydata()) == 2  # a step without a value is a gap, not left out
