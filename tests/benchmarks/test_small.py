"""The quick benchmarks run, and print the tables that the docs quote."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def ran(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")


def test_sandbox(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran("sandbox", "2", monkeypatch=monkeypatch)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| tier | ms a program | ms a start of Python | ratio |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| 1", "| 2", "| 3"]


def test_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "busy.py"
    script.write_text("import time\nwhile time.process_time() < 1: pass\n")
    with pytest.raises(SystemExit, match=r"^0$"):
        ran("processes", str(script), monkeypatch=monkeypatch)
    found = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[3:]]
    assert [row[:2] for row in found] == [["| busy.py", "1"], ["| all", "1"]]
    assert 0.7 < float(found[0][2]) < 1.5
