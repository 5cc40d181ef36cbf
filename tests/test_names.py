"""Names that users give are taken by MLflow, file systems, URIs, figures and tables as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.validation import _validate_batch_log_data
from rich.console import Console
from sqlalchemy.engine import make_url

from semalign.artifacts.artifact import Workspace
from semalign.names import file_name, record_name, sqlite_uri
from semalign.report import figures, table
from tests.artifacts.texts import Words

ODD = [
    *("Business & Law", "C++", "C##", "what's new?", "a/b", "../..", "..", ".", "", " a", "a "),
    *("x" * 300, "y" * 300, "é" * 200, "low", "Größe", "a\nb", "😀", "[red]", "$x$ and $y$", "-a"),
]


def test_mlflow_takes_every_name_and_keeps_them_apart() -> None:
    groups = [record_name(name, taken=("low",)) for name in ODD]
    assert len(set(groups)) == len(ODD) and "low" not in groups
    keys = [f"test/{record_name('x' * 300)}/{record_name('y/z')}.{group}" for group in groups]
    assert all(len(key) <= 250 for key in keys)
    _validate_batch_log_data(
        [Metric(key, 1.0, 0, 0) for key in keys],
        [Param(key, "") for key in keys],
        [RunTag(key, "") for key in keys],
    )


@pytest.mark.parametrize(
    "name", ["high_school_physics", "student", "lora-v1.2", "machine learning"]
)
def test_a_name_that_fits_is_kept(name: str) -> None:
    assert record_name(name) == file_name(name) == name


def test_every_name_is_one_folder_that_is_found_again(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for name in ODD:
        artifact = Words(text=name, title=name)
        place = workspace.place(artifact)
        place.mkdir(parents=True)
        assert place.parent == tmp_path / artifact.folder
        assert workspace.place(artifact) == place
    assert len(list((tmp_path / Words.folder).iterdir())) == len(ODD)


@pytest.mark.parametrize("name", ["a b", "a#b", "a?b", "a%20b", "a:b@c", "ü", "it's", "a+b&c"])
def test_a_database_is_where_its_uri_points(name: str) -> None:
    assert make_url(sqlite_uri(Path("/tmp") / name / "m.db")).database == f"/tmp/{name}/m.db"
    assert sqlite_uri(Path("/work/mlflow.db")) == "sqlite:////work/mlflow.db"


def test_tables_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console: Console = table.new_console()
    console.print(table.terminal("model[v1]", ["a [/x]", ":smile:"], [["run[red]", "1"]]))
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("model[v1]", "a [/x]", ":smile:", "run[red]"))
    assert table.markdown(["a|b"], [["c|d"]]) == "| a\\|b |\n| --- |\n| c\\|d |\n"


def test_figures_draw_names_as_they_are(tmp_path: Path) -> None:
    for drawn in (
        figures.heat_map(("a", ["$x_$", "$^$"]), ("b", ["$", "c$\\"]), [1.0, 2.0], "score"),
        figures.parallel_coordinates({"a": ["$x_$", "$^$"]}, [1.0, 2.0], "score"),
    ):
        drawn.savefig(tmp_path / "figure.png")
