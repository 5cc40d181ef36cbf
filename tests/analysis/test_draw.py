"""What is drawn and tabled is what the data says, with layers counted from 1."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from semalign.analysis.draw import DRAW, TABLE
from semalign.report import table

SOURCE = {"task": "humaneval", "split": "extract", "examples": 32}


def decomposition(layers: int = 3) -> dict[str, Any]:
    curves = [
        {
            "bases": bases,
            "map": how,
            "isotropic": 0.9,
            "mean": [level + 0.01 * state for state in range(layers + 1)],
            "std": [0.02] * (layers + 1),
            "low": [level - 0.1] * (layers + 1),
            "high": [level + 0.05] * (layers + 1),
        }
        for how, start in (("cosine", 0.5), ("dual", 0.8))
        for bases, level in (("output", start), ("input", start + 0.1), ("random", start + 0.15))
    ]
    states = [str(layer + 1) for layer in range(layers)] + ["norm"]
    return {
        "figure": "decomposition", "model": "/models/Llama", **SOURCE, "states": states,
        "width": 128, "atoms": 512, "random_theory": 0.894, "curves": curves,
    }  # fmt: skip


def similarity(rows: int = 3, columns: int = 2, names: tuple[str, ...] = ("before", "after")):  # type: ignore[no-untyped-def]
    exact = [
        [(row + column) / (rows + columns) for column in range(columns)] for row in range(rows)
    ]
    panels = [
        {"name": name, "exact": exact, "minibatch": exact, "max_difference": 0.01} for name in names
    ]
    return {
        "figure": "similarity", "teacher": "zoo/teacher", "student": "zoo/student", **SOURCE,
        "map": "cosine", "panels": panels,
    }  # fmt: skip


def attribution() -> dict[str, Any]:
    curves = [
        {"granularity": granularity, "aggregation": how, "critical": 2,
         "scores": [1.0, -3.0, 2.0], "share": [1 / 6, -0.5, 1 / 3]}
        for granularity in ("block", "attn", "mlp")
        for how in ("abs_sum", "sum")
    ]  # fmt: skip
    return {"figure": "attribution", "teacher": "zoo/teacher", **SOURCE, "curves": curves}


def ticks(axes: Axes, side: str = "x") -> list[str]:
    return [text.get_text() for text in getattr(axes, f"get_{side}ticklabels")()]


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_decomposition_draws_every_curve_and_the_theory() -> None:
    data = decomposition()
    cosine, dual = DRAW["decomposition"](data).axes
    assert ticks(cosine) == ["1", "2", "3", "norm"]
    for axes, how in ((cosine, "cosine"), (dual, "dual")):
        for curve in (c for c in data["curves"] if c["map"] == how):
            assert ([0, 1, 2], curve["mean"][:3]) in lines(axes)
            assert ([3], curve["mean"][3:]) in lines(axes)
    assert ([0, 1], [0.894, 0.894]) in lines(cosine)
    low, high = cosine.get_ylim()
    assert low == 0 and high > 1  # the paper's zero is on the axis
    assert "theory" in str(cosine.get_legend_handles_labels()[1])


def test_many_layers_have_some_ticks() -> None:
    cosine, _ = DRAW["decomposition"](decomposition(40)).axes
    assert ticks(cosine) == ["1", "5", "9", "13", "17", "21", "25", "29", "33", "37", "norm"]
    heat = DRAW["similarity"](similarity(40, 32)).axes[0]
    assert ticks(heat)[:3] == ["1", "3", "5"] and ticks(heat, "y")[:3] == ["1", "4", "7"]
    assert not heat.texts  # no room for numbers


def test_similarity_draws_all_panels_on_one_scale_from_0_to_1() -> None:
    data = similarity(names=("before", "after", "trained"))
    figure = DRAW["similarity"](data)
    *panels, bar = figure.axes
    assert len(panels) == 3 and bar.get_ylabel() == "linear CKA"
    for axes, panel in zip(panels, data["panels"], strict=True):
        [image] = axes.get_images()
        assert image.get_clim() == (0, 1)
        assert image.get_array().tolist() == panel["exact"]
        texts = {(text.get_position(), text.get_text()) for text in axes.texts}
        assert ((1, 2), "0.60") in texts and len(texts) == 6  # student 2, teacher 3
        assert axes.get_title().startswith(panel["name"])
    assert ticks(panels[0]) == ["1", "2"] and ticks(panels[0], "y") == ["1", "2", "3"]
    assert "teacher" in panels[0].get_ylabel() and "student" in panels[0].get_xlabel()


def test_attribution_fills_the_critical_layer() -> None:
    figure = DRAW["attribution"](attribution())
    for axes in figure.axes:
        assert lines(axes).count(([1, 2, 3], [1 / 6, -0.5, 1 / 3])) == 3
        assert lines(axes).count(([2], [-0.5])) == 3
    assert figure.axes[0].get_legend_handles_labels()[1] == ["block", "attn", "mlp"]


@pytest.mark.parametrize("data", [decomposition(), similarity(), attribution()])
def test_tables_fit_in_80_columns(data: dict[str, Any]) -> None:
    title, head, rows = TABLE[data["figure"]](data)
    console = Console(width=80, record=True, file=StringIO())
    console.print(table.terminal("", head, rows))
    assert "…" not in console.export_text()
    assert data.get("model", data.get("teacher")) in title


def test_tables_say_what_the_data_says() -> None:
    _, head, rows = TABLE["decomposition"](decomposition())
    assert head == ["layer", "output", "input", "random", " dual (least)"]
    first = [cell.strip() for cell in rows[0]]
    assert first == ["1", "0.500 ±0.020", "0.600 ±0.020", "0.650 ±0.020", "0.800"]
    _, head, rows = TABLE["similarity"](similarity())
    assert rows[1] == ["2", "3 (0.600)", "3 (0.600)"]
    _, _, rows = TABLE["attribution"](attribution())
    assert rows[1][:2] == ["2", "-0.500*"] and rows[3][1].strip() == "6"


@pytest.mark.parametrize("data", [decomposition(), similarity(), attribution()])
def test_no_text_leaves_the_figure(data: dict[str, Any]) -> None:
    figure: Figure = DRAW[data["figure"]](data)
    figure.savefig("/dev/null", format="png")
    box = figure.bbox
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            place = text.get_window_extent()
            assert place.x0 >= box.x0 - 1 and place.x1 <= box.x1 + 1
            assert place.y0 >= box.y0 - 1 and place.y1 <= box.y1 + 1
