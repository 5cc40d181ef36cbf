"""The analysis drawn and tabled from its data alone. Layers on axes count from 1, as in the paper.

Colours are Okabe and Ito's, told apart by colour-blind readers too; so are the markers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from semalign.core.pairing import paper_number

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#777777"
Data = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]  # title, column titles, rows

# bases -> (label, colour, marker, size): sizes nest where all curves lie on each other
_BASES = {
    "output": ("output-side: LM head's pseudoinverse", BLUE, "o", 9.0),
    "input": ("input-side: embedding rows", ORANGE, "s", 6.0),
    "random": ("random directions", GREEN, "^", 4.0),
}
_MAPS = {
    "cosine": "cosine map: projections on unit atoms, added up",
    "dual": "dual map: atoms and their dual frame",
}
_GRANULARITIES = {"block": (BLUE, "o"), "attn": (ORANGE, "s"), "mlp": (GREEN, "^")}
_PANELS = {
    "before": "before: teacher's outputs as they are",
    "after": "after: teacher's outputs in the student's space",
    "trained": "trained: student with the adapter",
}
_ROOM = 16  # a cell has room for its number when no side has more layers


def decomposition(data: Data) -> Figure:
    """Figure 2: mean cosine by layer with the band from 5th to 95th percentile; a panel a map."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    places = range(len(data["states"]))
    layers = len(places) - 1
    for axes, how in zip(panels, ("cosine", "dual"), strict=True):
        for curve in data["curves"]:
            if curve["map"] == how:
                _cosine_curve(axes, curve, layers)
        axes.set_title(_MAPS[how], fontsize=10)
        ticks = [*range(0, layers, _step(layers)), layers]
        axes.set_xticks(ticks, [data["states"][place] for place in ticks])
        axes.set_xlabel("layer output (counted from 1); norm: what the LM head reads")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    panels[0].axhline(
        data["random_theory"], color=GREEN, linestyle="--", linewidth=1.2, label="random: theory"
    )
    lowest = min(low for curve in data["curves"] for low in curve["low"])
    panels[0].set_ylim(min(0.0, lowest - 0.02), 1.04)
    panels[0].set_ylabel("cosine with the layer output")
    figure.suptitle(
        f"Decomposed and recomposed layer outputs of {_name(data['model'])} "
        f"(D={data['width']}, {data['atoms']} atoms; {_data(data)})",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _cosine_curve(axes: Axes, curve: Data, layers: int) -> None:
    label, colour, marker, size = _BASES[curve["bases"]]
    places = range(layers + 1)
    look: Data = {"color": colour, "marker": marker, "markersize": size, "fillstyle": "none"}
    axes.plot(places[:-1], curve["mean"][:-1], label=label, markevery=_step(layers), **look)
    axes.plot(places[-1:], curve["mean"][-1:], linestyle="none", **look)
    low, high = curve["low"], curve["high"]
    axes.fill_between(places[:-1], low[:-1], high[:-1], color=colour, alpha=0.18, linewidth=0)
    axes.vlines(layers, low[-1], high[-1], color=colour, alpha=0.4, linewidth=3)


def _step(layers: int) -> int:
    """From one marked layer to the next, so that some ten are."""
    return max(1, -(-layers // 10))


def similarity(data: Data) -> Figure:
    """Figure 4: exact CKA of teacher and student layers, a heat map a panel on one scale."""
    panels = data["panels"]
    rows, columns = len(panels[0]["exact"]), len(panels[0]["exact"][0])
    wide, high = min(max(0.62 * columns, 3.4), 7.0), min(max(0.52 * rows, 2.8), 7.0)
    figure = Figure(figsize=(len(panels) * wide + 1.4, high + 1.4), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=True):
        image = axes.imshow(
            panel["exact"], cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower"
        )
        if max(rows, columns) <= _ROOM:
            _write_cells(axes, panel["exact"])
        axes.set_title(_PANELS[panel["name"]], fontsize=9)
        axes.set_xlabel("student layer (from 1)")
        axes.set_xticks(*_layer_ticks(columns))
    grid[0].set_ylabel("teacher layer (from 1)")
    grid[0].set_yticks(*_layer_ticks(rows))
    figure.colorbar(image, ax=list(grid), label="linear CKA")
    furthest = max(panel["max_difference"] for panel in panels)
    figure.suptitle(
        f"{_name(data['teacher'])} and {_name(data['student'])} ({_data(data)}; {data['map']} map; "
        f"minibatch CKA within {furthest:.3f})",
        fontsize=9,
    )
    return figure


def _write_cells(axes: Axes, matrix: Sequence[Sequence[float]]) -> None:
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            colour = "white" if value < 0.5 else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8
            )


def _layer_ticks(count: int) -> tuple[list[int], list[str]]:
    """Every layer, or some where there are many; always the first."""
    places = list(range(0, count, max(1, -(-count // _ROOM))))
    return places, [str(paper_number(place)) for place in places]


def attribution(data: Data) -> Figure:
    """Share of the scores' magnitudes by teacher layer; the critical layer of a curve is filled."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"abs_sum": "abs_sum: magnitudes added up", "sum": "sum: signed values added up"}
    for axes, (how, title) in zip(panels, titles.items(), strict=True):
        for curve in data["curves"]:
            if curve["aggregation"] == how:
                colour, marker = _GRANULARITIES[curve["granularity"]]
                numbers = [paper_number(layer) for layer in range(len(curve["share"]))]
                look: Data = {"color": colour, "marker": marker, "markersize": 8}
                label = curve["granularity"]
                axes.plot(numbers, curve["share"], fillstyle="none", label=label, **look)
                top = curve["critical"]
                axes.plot([top], [curve["share"][top - 1]], linestyle="none", **look)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("teacher layer (counted from 1)")
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("gradient x activation,\nshare of the sum of magnitudes")
    figure.suptitle(
        f"Layer attribution of {_name(data['teacher'])} ({_data(data)}; "
        "filled: the critical layer)",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def decomposition_table(data: Data) -> Table:
    """A row a state: the cosine map's mean and standard deviation by atoms, and of the dual map's
    means the least.
    """
    cosine, dual = ([c for c in data["curves"] if c["map"] == how] for how in ("cosine", "dual"))
    rows = [
        [
            state,
            *(f" {curve['mean'][place]:.3f} ±{curve['std'][place]:.3f}" for curve in cosine),
            f" {min(curve['mean'][place] for curve in dual):.3f}",
        ]
        for place, state in enumerate(data["states"])
    ]
    least = min(curve["isotropic"] for curve in dual)
    rows.append(["isotropic", *(f"{curve['isotropic']:.3f}" for curve in cosine), f"{least:.3f}"])
    title = (
        f"{data['model']}: cosine of layer outputs and their recomposition "
        f"(random in theory {data['random_theory']:.3f})"
    )
    return title, ["layer", *(curve["bases"] for curve in cosine), " dual (least)"], rows


def similarity_table(data: Data) -> Table:
    """A row a student layer: the teacher layer most like it, in each panel."""
    panels = data["panels"]
    rows = []
    for column in range(len(panels[0]["exact"][0])):
        best = [_best([row[column] for row in panel["exact"]]) for panel in panels]
        rows.append([str(paper_number(column)), *best])
    rows.append(["mean of all", *(f"{_mean(panel['exact']):.3f}" for panel in panels)])
    rows.append(["minibatch", *(f"{_mean(panel['minibatch']):.3f}" for panel in panels)])
    rows.append(["furthest", *(f"{panel['max_difference']:.3f}" for panel in panels)])
    title = f"most similar layer of {data['teacher']} (its CKA) for each of {data['student']}"
    return title, ["student layer", *(panel["name"] for panel in panels)], rows


def _best(column: Sequence[float]) -> str:
    top = max(range(len(column)), key=column.__getitem__)
    return f"{paper_number(top)} ({column[top]:.3f})"


def _mean(matrix: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, matrix)) / sum(map(len, matrix))


def attribution_table(data: Data) -> Table:
    """A row a layer, a column a curve: shares, a star at the critical layer."""
    curves = data["curves"]
    head = ["layer", *(f"{curve['granularity']} {curve['aggregation'][:3]}" for curve in curves)]
    rows = [
        [
            str(paper_number(layer)),
            *(
                f"{curve['share'][layer]:+.3f}{'*' if curve['critical'] == layer + 1 else ' '}"
                for curve in curves
            ),
        ]
        for layer in range(len(curves[0]["share"]))
    ]
    total = [sum(map(abs, curve["scores"])) for curve in curves]
    rows.append(["total, nats", *(f"{value:.4g} " for value in total)])
    return f"attribution of {data['teacher']}: share of the sum of magnitudes", head, rows


DRAW = {"decomposition": decomposition, "similarity": similarity, "attribution": attribution}
TABLE = {
    "decomposition": decomposition_table,
    "similarity": similarity_table,
    "attribution": attribution_table,
}


def _data(data: Data) -> str:
    return f"{data['task']} {data['split']}, {data['examples']} examples"


def _name(model: str) -> str:
    """`zoo/student` and hub ids as they are, of a path its last folder."""
    return Path(model).name if Path(model).is_absolute() else model
