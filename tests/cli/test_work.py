"""`runs`, `compare` and `clean`."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

RIGHT = "+" * 60 + "-" * 40
BETTER = "+" * 80 + "-" * 20


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.startswith(" ")]


def test_runs_are_listed_newest_first(call: Any, work: Any) -> None:
    work.transfer("mmlu-sft-00ab", {"mmlu": RIGHT}, days=3)
    work.transfer("mmlu-semalign-11cd", {"gsm8k": RIGHT, "mmlu": BETTER}, days=1, split="dev")
    (work.path / "transfers" / "latest").symlink_to("mmlu-semalign-11cd")
    (work.path / "transfers" / "mmlu-laten-22ef").mkdir()
    work.sweep("pairs-33", {"a/0": RIGHT}, best="a0")
    work.artifact("activations", "mmlu-44", size=2_000_000)
    done = call("runs", "--workdir", work.path)
    assert done.exit_code == 0, done.output
    rows = {row[0]: row[1:] for row in table(done.stdout)}
    assert rows["mmlu-sft-00ab"][:5] == ["transfers", "sft", "mmlu", "test", "60.0"]
    assert rows["mmlu-sft-00ab"][6:8] == ["3", "d"]
    assert rows["mmlu-semalign-11cd"][:5] == ["transfers", "semalign", "mmlu", "dev", "80.0"]
    assert rows["mmlu-laten-22ef"][:2] == ["transfers", "unfinished"]
    assert rows["pairs-33"][:3] == ["sweeps", "1", "trials"]
    assert rows["activations"] == ["1", "2", "MB"]
    names = [row[0] for row in table(done.stdout)]
    assert names.index("mmlu-semalign-11cd") < names.index("mmlu-sft-00ab")


def test_compare_tests_each_against_the_first(call: Any, work: Any) -> None:
    first = work.transfer("mmlu-sft-00ab", {"mmlu": RIGHT, "gsm8k": RIGHT})
    work.transfer("mmlu-semalign-11cd", {"mmlu": BETTER})
    work.transfer("mmlu-laten-22ef", {"mmlu": RIGHT, "gsm8k": RIGHT})
    done = call("compare", first, "mmlu-semalign", "22ef", "--workdir", work.path)
    assert done.exit_code == 0, done.output
    titles = [line.strip() for line in done.stdout.splitlines() if ", test" in line]
    assert titles == ["mmlu, test", "gsm8k, test"]
    assert "60.0 (50-69)" in done.stdout and "80.0 (71-87)" in done.stdout
    assert (
        "mmlu-sft-00ab -> mmlu-semalign-11cd: +20.0 points (95% 12.0 to 28.0), McNemar p < 0.001, "
        "n = 100" in done.stdout
    )
    assert done.stdout.count("mmlu-sft-00ab -> mmlu-laten-22ef: +0.0 points") == 2


def test_compare_finds_records_of_a_folder_that_was_moved(call: Any, work: Any) -> None:
    work.transfer("mmlu-sft-00ab", {"mmlu": RIGHT})
    work.transfer("mmlu-semalign-11cd", {"mmlu": BETTER})
    moved = work.path.rename(work.path.with_name("elsewhere"))
    assert "+20.0 points" in call("compare", "00ab", "11cd", "-w", moved).stdout


def test_compare_a_sweeps_chosen_setting_over_its_seeds(call: Any, work: Any) -> None:
    work.transfer("mmlu-sft-00ab", {"mmlu": RIGHT})
    work.sweep("pairs-33", {"a/0": RIGHT, "b/0": BETTER, "b/1": RIGHT}, best="b0")
    done = call("compare", "00ab", "pairs-33", "--workdir", work.path)
    assert done.exit_code == 0, done.output
    assert "mmlu-sft-00ab -> pairs-33: +10.0 points" in done.stdout
    [row] = [row for row in table(done.stdout) if row[0] == "pairs-33"]
    assert row == ["pairs-33", "70.0", "(60-78)", "100", "2"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["00ab"], "expected at least two runs to compare, found 1"),
        (["00ab", "mmlu-"], "mmlu-: fits mmlu-laten-22ef, mmlu-other-44, mmlu-semalign-11cd, "),
        (["00ab", "mmlu-sfft"], "mmlu-sfft: not in "),
        (["00ab", "22ef"], "mmlu-laten-22ef: not finished; the same command again goes on with"),
        (["00ab", "chosen-none"], "chosen-none: the sweep has chosen no setting; see its report"),
        (
            ["00ab", "44"],
            "mmlu-sft-00ab was scored under paper-1@3f2a9c and mmlu-other-44 under x:",
        ),
        (["00ab", "11cd"], "mmlu-sft-00ab: no other run was scored on one of its tasks and splits"),
    ],
)
def test_what_does_not_compare(call: Any, work: Any, runs: list[str], message: str) -> None:
    work.transfer("mmlu-sft-00ab", {"mmlu": RIGHT})
    work.transfer("mmlu-semalign-11cd", {"gsm8k": RIGHT})
    work.transfer("mmlu-other-44", {"mmlu": RIGHT}, profile="x")
    (work.path / "transfers" / "mmlu-laten-22ef").mkdir()
    work.sweep("chosen-none", {"a/0": RIGHT}, best=None)
    done = call("compare", *runs, "--workdir", work.path)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {message}")


@pytest.fixture
def shared(work: Any) -> Any:
    """Two transfers that share a map; each has activations of its own."""
    work.artifact("maps", "cosine-m0", days=9)
    work.artifact("activations", "mmlu-a0", days=9, size=5_000)
    work.artifact("activations", "mmlu-a1", days=1)
    work.artifact("transfers", "mmlu-sft-t0", days=8, needs=("m0", "a0"))
    work.artifact("transfers", "mmlu-sft-t1", days=1, needs=("m0", "a1"))
    (work.path / "transfers" / "latest").symlink_to("mmlu-sft-t0")
    (work.path / "mlflow.db").write_text("kept")
    return work


def left(work: Any) -> set[str]:
    return {path.name for path in work.path.glob("*/*")}


ALL = {"cosine-m0", "mmlu-a0", "mmlu-a1", "mmlu-sft-t0", "mmlu-sft-t1", "latest"}


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (["--older-than", "5d"], {"cosine-m0", "mmlu-a0", "mmlu-sft-t0", "latest"}),
        (["--older-than", "36h", "--kind", "maps"], {"cosine-m0"}),
        (["--kind", "activations"], {"mmlu-a0", "mmlu-a1"}),
        (["--run", "t0"], {"mmlu-sft-t0", "mmlu-a0", "latest"}),
        (["--run", "t0", "--run", "mmlu-sft-t1"], ALL),
        (["--run", "t0", "--kind", "activations"], {"mmlu-a0"}),
        (["--older-than", "30d"], set()),
    ],
)
def test_clean(call: Any, shared: Any, options: list[str], gone: set[str]) -> None:
    done = call("clean", *options, "--yes", "--workdir", shared.path)
    assert done.exit_code == 0, done.output
    assert left(shared) == ALL - gone
    assert (shared.path / "mlflow.db").read_text() == "kept"


def test_clean_shows_bytes_and_asks(call: Any, shared: Any) -> None:
    from typer.testing import CliRunner

    from semalign.cli import app

    words = ["clean", "--kind", "activations", "--workdir", str(shared.path)]
    done = CliRunner().invoke(app, words, input="n\n")
    assert done.exit_code == 1 and left(shared) == ALL
    assert "5.09 kB" in done.stdout and "Delete these 2 folders, 5.18 kB" in done.stdout
    assert CliRunner().invoke(app, words, input="y\n").exit_code == 0
    assert left(shared) == ALL - {"mmlu-a0", "mmlu-a1"}


def test_clean_a_sweep_with_its_trials(call: Any, shared: Any) -> None:
    """Not with a trial's transfer that another sweep has too."""
    folder = shared.sweep("one-s1", {"a/0": RIGHT}, best="a0")
    other = shared.sweep("two-s2", {"b/0": RIGHT}, best="b0")
    for sweep, keys in ((folder, ("t0", "t1")), (other, ("t1",))):
        for key in keys:
            found = {"folder": str(shared.path / "transfers" / f"mmlu-sft-{key}"), "records": {}}
            (sweep / "finished" / f"{key}.json").write_text(json.dumps(found))
    assert call("clean", "--run", "one-s1", "--yes", "-w", shared.path).exit_code == 0
    names = {path.name for kind in ("sweeps", "transfers", "activations", "maps")
             for path in (shared.path / kind).glob("*")}  # fmt: skip
    assert names == {"two-s2", "mmlu-sft-t1", "mmlu-a1", "cosine-m0"}


def test_clean_leaves_what_is_being_made(call: Any, shared: Any) -> None:
    folder = shared.path / "activations" / "mmlu-a2"
    folder.mkdir()
    assert call("clean", "--kind", "activations", "--yes", "-w", shared.path).exit_code == 0
    assert left(shared) & {"mmlu-a0", "mmlu-a1", "mmlu-a2"} == {"mmlu-a2"}
    os.utime(folder, (time.time() - 7200,) * 2)
    assert call("clean", "--kind", "activations", "--yes", "-w", shared.path).exit_code == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected what to delete: --older-than, --kind or --run"),
        (["--kind", "map"], "--kind map: did you mean 'maps'?"),
        (["--older-than", "soon"], "'soon': expected an age such as 30d, 12h or 45min"),
        (["--run", "mmlu-stf-t0"], "mmlu-stf-t0: not in "),
        (["--run", "mmlu-sft"], "mmlu-sft: fits mmlu-sft-t0, mmlu-sft-t1; expected the name or"),
    ],
)
def test_what_clean_refuses(call: Any, shared: Any, options: list[str], message: str) -> None:
    done = call("clean", *options, "--yes", "--workdir", shared.path)
    assert done.exit_code == 2 and left(shared) == ALL
    assert done.stderr.startswith(f"error: {message}")
