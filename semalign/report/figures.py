"""Figures of a transfer and of a sweep. Layers on axes count from 1, as in the paper."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from semalign.core.pairing import Pair, paper_number

INK, ACCENT, SOFT = "#1f3b57", "#d1495b", "#9bb1c8"


def attribution(scores: Sequence[float], critical: Sequence[int], granularity: str) -> Figure:
    """Score of each teacher layer, the critical ones in red."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    colours = [ACCENT if layer in critical else SOFT for layer in range(len(scores))]
    axes.bar([paper_number(layer) for layer in range(len(scores))], scores, color=colours)
    axes.set_xlabel("teacher layer (counted from 1)")
    axes.set_ylabel("gradient x activation")
    axes.set_title(f"Layer attribution, {granularity} outputs (critical layers in red)")
    return figure


def pairing(pairs: Sequence[Pair], teacher_layers: int, student_layers: int) -> Figure:
    """Both stacks side by side at equal height, a line per pair, as in the paper's Figure 3."""
    figure = Figure(figsize=(4, 5), layout="constrained")
    axes = figure.subplots()
    for x, count in ((0.0, teacher_layers), (1.0, student_layers)):
        heights = [paper_number(layer) / count for layer in range(count)]
        axes.scatter([x] * count, heights, s=60, color=SOFT, zorder=2)
        for layer, height in enumerate(heights):
            axes.annotate(
                str(paper_number(layer)),
                (x, height),
                ha="right" if x == 0 else "left",
                va="center",
                xytext=(-8 if x == 0 else 8, 0),
                textcoords="offset points",
            )
    for pair in pairs:
        for layer, weight in zip(pair.teacher, pair.weights, strict=True):
            axes.plot(
                [0, 1],
                [paper_number(layer) / teacher_layers, paper_number(pair.student) / student_layers],
                color=ACCENT,
                linewidth=1 + 2 * weight,
                zorder=1,
            )
    axes.set_xticks([0, 1], ["teacher layer", "student layer"])
    axes.set_xlim(-0.4, 1.4)
    axes.set_yticks([])
    axes.set_title("Layer pairs (counted from 1)")
    return figure


def loss_curve(steps: Mapping[str, Sequence[float | None]]) -> Figure:
    """The losses of every step: total, cross-entropy and KL in nats, alignment on its own axis.

    A step at which a term has no value (None) is a gap.
    """
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    number = range(1, len(steps["loss"]) + 1)
    nats = [
        ("cross_entropy", "cross-entropy", INK, "-"),
        ("kl_divergence", "KL", INK, ":"),
        ("loss", "total", SOFT, "-"),
    ]
    for name, label, colour, line in nats:
        if name in steps:
            values = _gaps(steps[name])
            axes.plot(number, values, line, color=colour, label=label, marker=".", markersize=2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    for name in steps.keys() & {"cosine_loss", "fisher_loss", "geometry_loss"}:
        right, label = axes.twinx(), f"{name.removesuffix('_loss')} (right)"
        right.plot(number, _gaps(steps[name]), color=ACCENT, label=label)
        right.set_ylabel(name.replace("_", " "))
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def parallel_coordinates(
    axes: Mapping[str, Sequence[Any]], values: Sequence[float], label: str
) -> Figure:
    """Parallel coordinates: a line a setting, coloured by its value, with the best on top.

    Axes of few distinct values have these as evenly spaced ticks, others are linear.
    """
    figure = Figure(figsize=(2 + 1.8 * max(2, len(axes)), 4.2), layout="constrained")
    plot = figure.subplots()
    scale, colours = Normalize(min(values), max(values)), colormaps["viridis"]
    heights = []
    for x, column in enumerate(axes.values()):
        ticks, places = _places(column)
        heights.append(places)
        plot.axvline(x, color=SOFT, linewidth=1, zorder=0)
        for tick, height in ticks:
            plot.annotate(
                tick,
                (x, height),
                xytext=(4, 2),
                textcoords="offset points",
                fontsize=8,
                zorder=3,
                bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.7},
            )
    for line, value in sorted(enumerate(values), key=lambda item: item[1]):
        path = [places[line] for places in heights]
        colour = colours(float(scale(value)))
        plot.plot(range(len(axes)), path, color=colour, linewidth=1.8, marker="o")
    plot.set_xticks(range(len(axes)), list(axes))
    plot.set_xlim(-0.2, max(1, len(axes) - 1) + 0.5)
    plot.set_ylim(-0.08, 1.08)
    plot.set_yticks([])
    plot.spines[:].set_visible(False)
    figure.colorbar(ScalarMappable(scale, colours), ax=plot, label=label)
    return figure


def _places(column: Sequence[Any]) -> tuple[list[tuple[str, float]], list[float]]:
    """Ticks (text, height in [0, 1]) of one axis, and the height of each value."""
    distinct = _ordered(column)
    low, high = distinct[0], distinct[-1]
    if len(distinct) > 10 and not isinstance(low, str):
        return [(_text(low), 0.0), (_text(high), 1.0)], [(v - low) / (high - low) for v in column]
    step = 1 / max(1, len(distinct) - 1)
    height = {value: place * step for place, value in enumerate(distinct)}
    return [(_text(value), place) for value, place in height.items()], [height[v] for v in column]


def heat_map(
    x: tuple[str, Sequence[Any]], y: tuple[str, Sequence[Any]], values: Sequence[float], label: str
) -> Figure:
    """The mean value at each pair of distinct values of two axes; empty where there is none."""
    columns, rows = _ordered(x[1]), _ordered(y[1])
    cells: dict[tuple[Any, Any], list[float]] = {}
    for column, row, value in zip(x[1], y[1], values, strict=True):
        cells.setdefault((row, column), []).append(value)
    means = {place: statistics.fmean(found) for place, found in cells.items()}
    grid = [[means.get((row, column), float("nan")) for column in columns] for row in rows]
    figure = Figure(figsize=(2.5 + 0.8 * len(columns), 1.8 + 0.5 * len(rows)), layout="constrained")
    plot = figure.subplots()
    scale = Normalize(min(means.values()), max(means.values()))
    image = plot.imshow(grid, cmap="viridis", norm=scale, aspect="auto", origin="lower")
    for (row, column), value in means.items():
        dark = float(scale(value)) < 0.6
        place = columns.index(column), rows.index(row)
        plot.text(*place, f"{value:.1f}", ha="center", va="center", color="white" if dark else INK)
    turned = 45 if max(len(_text(value)) for value in columns) > 8 else 0
    plot.set_xticks(range(len(columns)), [_text(value) for value in columns], rotation=turned)
    plot.set_yticks(range(len(rows)), [_text(value) for value in rows])
    plot.set_xlabel(x[0])
    plot.set_ylabel(y[0])
    figure.colorbar(image, ax=plot, label=label)
    return figure


def _ordered(column: Sequence[Any]) -> list[Any]:
    """Distinct values: numbers by size, others as they come."""
    distinct = list(dict.fromkeys(column))
    return distinct if any(isinstance(value, str) for value in distinct) else sorted(distinct)


def _text(value: Any) -> str:
    """As a label, in which Matplotlib would read what is between dollars as a formula."""
    return value.replace("$", r"\$") if isinstance(value, str) else f"{value:g}"
