"""Planned memory against the peak of a process that makes the stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from pathlib import Path
from benchmarks.memory import few_rows, take
found = take("attribute", [*few_rows(Path(sys.argv[1])), *sys.argv[2:]])
print(found.planned / found.peak, found.peak)
"""


def planned_over_measured(folder: Path, *settings: str) -> float:
    """Planned over measured, of attribution on a few rows."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *settings],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1].split()[0])


def test_the_shipped_family(tmp_path: Path) -> None:
    """Mostly what a process has after its imports."""
    assert 0.75 < planned_over_measured(tmp_path) < 1.25
