"""Figures of one transfer. Layers on axes count from 1, as in the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def loss_curve(steps: Mapping[str, Sequence[float]]) -> Figure:
    """Both losses of every step, and the alignment cosine on its own axis."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    right = axes.twinx()
    number = range(1, len(steps["loss"]) + 1)
    axes.plot(number, steps["cross_entropy"], color=INK, label="cross-entropy")
    axes.plot(number, steps["loss"], color=SOFT, label="total loss")
    cosine = [1 - value for value in steps["cosine_loss"]]
    right.plot(number, cosine, color=ACCENT, label="alignment cosine")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    right.set_ylabel("alignment cosine")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
