"""Attribution of the teacher's layers (section 4.1), by granularity and aggregation.

Lists by layer begin with the shallowest layer, which people are shown as layer 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from semalign.analysis.figure import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    AnalysisFigure,
    FigureData,
    FigureInputs,
    FigureTable,
    examples_caption,
    model_caption,
)
from semalign.config.jobs import AnalysisJob
from semalign.core.attribution import AGGREGATIONS, critical_layers
from semalign.core.pairing import paper_number
from semalign.data.tokens import Tokens
from semalign.models.decoder import INTERFACES
from semalign.stages.attribution import attribution_scores

_GRANULARITIES = {"block": (BLUE, "o"), "attn": (ORANGE, "s"), "mlp": (GREEN, "^")}
_TITLES = {"abs_sum": "abs_sum: magnitudes added up", "sum": "sum: signed values added up"}


class AttributionFigure(AnalysisFigure):
    """Share of the scores' magnitudes by teacher layer; the critical layer of a curve is filled."""

    name = "attribution"
    models = ("teacher",)

    def measure(
        self, job: AnalysisJob, inputs: FigureInputs, models: Sequence[nn.Module]
    ) -> dict[str, Any]:
        [teacher] = models
        return attribution_curves(teacher, inputs.tokens, batch_size=job.batch_size)

    def draw(self, data: FigureData) -> Figure:
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, (how, title) in zip(panels, _TITLES.items(), strict=True):
            for curve in data["curves"]:
                if curve["aggregation"] == how:
                    _draw_curve(axes, curve)
            axes.axhline(0, color=GREY, linewidth=0.8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("teacher layer (counted from 1)")
            axes.set_title(title, fontsize=10)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        panels[0].set_ylabel("gradient x activation,\nshare of the sum of magnitudes")
        figure.suptitle(
            f"Layer attribution of {model_caption(data['teacher'])} ({examples_caption(data)}; "
            "filled: the critical layer)",
            fontsize=11,
        )
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        return figure

    def table(self, data: FigureData) -> FigureTable:
        """A row a layer, a column a curve: shares, a star at the critical layer."""
        curves = data["curves"]
        titles = [f"{curve['granularity']} {curve['aggregation'][:3]}" for curve in curves]
        rows = [
            [str(paper_number(layer)), *(_share(curve, layer) for curve in curves)]
            for layer in range(len(curves[0]["share"]))
        ]
        total = [sum(map(abs, curve["scores"])) for curve in curves]
        rows.append(["total, nats", *(f"{value:.4g} " for value in total)])
        title = f"attribution of {data['teacher']}: share of the sum of magnitudes"
        return title, ["layer", *titles], rows


def attribution_curves(
    model: nn.Module, tokens: Sequence[Tokens], *, batch_size: int
) -> dict[str, Any]:
    """Scores of all layers (section 4.1) for each granularity and aggregation.

    `scores` are gradient x activation in nats, added up over tokens, channels and examples;
    `share` is the same over the sum of its magnitudes, so that curves can be compared. `critical`
    is the layer of the largest magnitude, counted from 1. Cost: a forward and a backward pass of
    all examples a curve. Raises UserError for a score that is not finite.
    """
    curves = []
    for granularity in INTERFACES:
        for aggregation in AGGREGATIONS:
            how = {"granularity": granularity, "aggregation": aggregation}
            scores = attribution_scores(model, tokens, batch_size=batch_size, **how)
            critical = paper_number(critical_layers(scores, 1)[0])
            curves.append(
                {**how, "scores": scores, "share": normalised(scores), "critical": critical}
            )
    return {"curves": curves}


def normalised(scores: Sequence[float]) -> list[float]:
    """Each score over the sum of all magnitudes; zeros stay zeros."""
    total = sum(map(abs, scores))
    return [score / total if total else 0.0 for score in scores]


def _draw_curve(axes: Axes, curve: FigureData) -> None:
    colour, marker = _GRANULARITIES[curve["granularity"]]
    numbers = [paper_number(layer) for layer in range(len(curve["share"]))]
    look: FigureData = {"color": colour, "marker": marker, "markersize": 8}
    axes.plot(numbers, curve["share"], fillstyle="none", label=curve["granularity"], **look)
    critical = curve["critical"]
    axes.plot([critical], [curve["share"][critical - 1]], linestyle="none", **look)


def _share(curve: FigureData, layer: int) -> str:
    star = "*" if curve["critical"] == paper_number(layer) else " "
    return f"{curve['share'][layer]:+.3f}{star}"
