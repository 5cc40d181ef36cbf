"""A task of one's own in one file, from training rows to a sweep's table on Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest

from semalign import register_task
from semalign.tasks import Profile, Row, Task
from tests.extending.check import SMALL, listed, made, planned, swept

ANSWERS = (" A", " B")
ROWS = {"train": range(40), "extract": range(40, 48), "dev": range(50, 60), "test": range(60, 80)}


class Parity(Task):
    """Is a number even (A) or odd (B)?"""

    name = "parity"
    kind = "choice"
    metric = "accuracy"
    schema = MappingProxyType({"number": int})
    template = "Question: {{ number }}\nA. even\nB. odd\nAnswer:"
    profile = Profile(prompt=template, choices=ANSWERS)

    def answer(self, row: Row) -> str:
        return ANSWERS[row["number"] % 2]


if __name__ == Path(__file__).stem:  # as a plugin
    register_task(Parity())


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    for split, numbers in ROWS.items():
        file = tmp_path / "data" / "parity" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"number": number}) + "\n" for number in numbers))
    root = tmp_path / "data"
    return [f"data.root={root}", "data.task=parity", "evaluation.tasks=[parity]"]


def test_it_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Is a number even (A) or odd (B)?" in listed("tasks", __file__, capsys)


def test_it_is_planned_and_run(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "16 training examples" in planned(__file__, *settings, capsys=capsys)
    assert made(tmp_path / "work", __file__, *settings)["name"] == "parity-semalign"
    assert swept(tmp_path, __file__, "loss.alpha: [0.1, 0.3]", *settings) == 2


def test_all_toys_in_one_sweep_on_ray(settings: list[str], tmp_path: Path) -> None:
    """The processes of the cluster import the files, and every trial is trained and scored."""
    here, sweep, work = Path(__file__).parent, tmp_path / "toys.yaml", tmp_path / "work"
    files = [str(here / f"test_toy_{name}.py") for name in ("method", "pairing", "objective")]
    sweep.write_text(
        f"base: {{plugins: [{', '.join([*files, __file__])}]}}\n"
        "axes: {toy: {cases: {method: {method: last-layer}, strategy: {pairing.strategy: middle}, "
        "objective: {loss.objective: mse}}}}\n"
    )
    small = [text for text in SMALL if not text.startswith("evaluation")]
    command = [sys.executable, "-m", "semalign", "ablate", str(sweep), f"workdir={work}"]
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1])}  # the files import `tests`
    run = subprocess.run(
        [*command, *small, *settings], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    [folder] = work.glob("sweeps/toys-*")
    rows = (folder / "trials.csv").read_text().splitlines()[1:]
    assert len(rows) == 4 and all("finished" in row for row in rows)
    assert not list(folder.glob("failed/*"))
