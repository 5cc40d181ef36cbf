"""What all figures share: keys, refused settings, ticks, tables and text that fits."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from semalign.analysis import FIGURES, AnalysisFigure, register_figure
from semalign.analysis.artifact import DrawnFigure
from semalign.analysis.figure import FigureData, FigureInputs, FigureTable
from semalign.analysis.inputs import load_figure_inputs
from semalign.artifacts.artifact import Workspace
from semalign.artifacts.local import LocalExecutor
from semalign.config.jobs import AnalysisJob
from semalign.config.read import resolve
from semalign.errors import UserError
from semalign.report import table
from tests.analysis.figure_data import (
    attribution_data,
    decomposition_data,
    similarity_data,
    ticks,
)


def drawn(*overrides: str) -> DrawnFigure:
    job = resolve([], overrides, AnalysisJob)
    return DrawnFigure(job=job, inputs=load_figure_inputs(job))


def test_the_key_names_what_determines_the_figure() -> None:
    def key(*overrides: str) -> str:
        return drawn("limit=2", *overrides).key

    base = key()
    assert key("num_gpus=1") == key("num_cpus=2") == key("figure=decomposition") == base
    assert key("batch_size=1") == base
    others = [key(text) for text in ("seed=1", "limit=3", "dtype=bfloat16", "model=zoo/teacher")]
    similarity = [
        key("figure=similarity", text)
        for text in ("seed=0", "positions=8", "alignment.map=dual", "student=zoo/teacher")
    ]
    assert len({base, *others, *similarity, key("figure=attribution")}) == 10


def test_a_key_the_figure_does_not_use_is_refused() -> None:
    job = resolve([], ["figure=attribution", "student=zoo/teacher"], AnalysisJob)
    with pytest.raises(UserError, match=r"student: figure=attribution does not use it; .* teacher"):
        load_figure_inputs(job)


def test_many_layers_have_some_ticks() -> None:
    cosine, _ = FIGURES["decomposition"].draw(decomposition_data(40)).axes
    assert ticks(cosine) == ["1", "5", "9", "13", "17", "21", "25", "29", "33", "37", "norm"]
    heat = FIGURES["similarity"].draw(similarity_data(40, 32)).axes[0]
    assert ticks(heat)[:3] == ["1", "3", "5"] and ticks(heat, "y")[:3] == ["1", "4", "7"]
    assert not heat.texts  # no room for numbers


@pytest.mark.parametrize("data", [decomposition_data(), similarity_data(), attribution_data()])
def test_tables_fit_in_80_columns(data: dict[str, Any]) -> None:
    title, head, rows = FIGURES[data["figure"]].table(data)
    console = Console(width=80, record=True, file=StringIO())
    console.print(table.terminal("", head, rows))
    assert "…" not in console.export_text()
    assert data.get("model", data.get("teacher")) in title


def test_tables_say_what_the_data_says() -> None:
    _, head, rows = FIGURES["decomposition"].table(decomposition_data())
    assert head == ["layer", "output", "input", "random", " dual (least)"]
    first = [cell.strip() for cell in rows[0]]
    assert first == ["1", "0.500 ±0.020", "0.600 ±0.020", "0.650 ±0.020", "0.800"]
    _, head, rows = FIGURES["similarity"].table(similarity_data())
    assert rows[1] == ["2", "3 (0.600)", "3 (0.600)"]
    _, _, rows = FIGURES["attribution"].table(attribution_data())
    assert rows[1][:2] == ["2", "-0.500*"] and rows[3][1].strip() == "6"


@pytest.mark.parametrize("data", [decomposition_data(), similarity_data(), attribution_data()])
def test_no_text_leaves_the_figure(data: dict[str, Any]) -> None:
    figure: Figure = FIGURES[data["figure"]].draw(data)
    figure.savefig("/dev/null", format="png")
    box = figure.bbox
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            place = text.get_window_extent()
            assert place.x0 >= box.x0 - 1 and place.x1 <= box.x1 + 1
            assert place.y0 >= box.y0 - 1 and place.y1 <= box.y1 + 1


class Sizes(AnalysisFigure):
    """A toy: the parameters of a student."""

    name = "sizes"
    models = ("student",)

    def measure(self, job: AnalysisJob, inputs: FigureInputs, models: Any) -> dict[str, Any]:
        return {"parameters": sum(weight.numel() for weight in models[0].parameters())}

    def draw(self, data: FigureData) -> Figure:
        figure = Figure()
        figure.subplots().bar([data["student"]], [data["parameters"]])
        return figure

    def table(self, data: FigureData) -> FigureTable:
        return "sizes", ["student", "parameters"], [[data["student"], str(data["parameters"])]]


def test_a_figure_is_added_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FIGURES, "_things", dict(FIGURES))
    register_figure(Sizes())
    job = resolve([], ["limit=2", "student=zoo/teacher"], AnalysisJob)
    job = job.model_copy(update={"figure": "sizes"})
    inputs = load_figure_inputs(job)
    assert inputs.overlap is None and inputs.teacher_tokens == inputs.tokens
    toy = DrawnFigure(job=job, inputs=inputs)
    workspace = Workspace(tmp_path)
    data = toy.read(LocalExecutor(workspace).make(toy))
    assert data["figure"] == "sizes" and data["examples"] == 2
    assert FIGURES["sizes"].table(data)[2] == [["zoo/teacher", str(data["parameters"])]]
    assert len(FIGURES["sizes"].draw(data).axes) == 1
