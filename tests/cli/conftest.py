"""The command, and a work folder with finished runs whose records are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from semalign.artifacts.records import write_records
from semalign.cli import app
from semalign.core.statistics import score
from tests.recorded import PROFILE, records

Call = Callable[..., Any]


@pytest.fixture
def call() -> Call:
    """Runs the command in this process; the result has exit_code, stdout and stderr."""
    return lambda *arguments: CliRunner().invoke(app, [str(word) for word in arguments])


class Work:
    """Writes what finished runs leave."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def artifact(
        self, kind: str, name: str, *, days: float = 0, needs: tuple[str, ...] = (), size: int = 10
    ) -> Path:
        folder = self.path / kind / name
        folder.mkdir(parents=True)
        (folder / "content").write_bytes(b"x" * size)
        made = datetime.now(UTC) - timedelta(days=days)
        manifest = {
            "kind": kind,
            "key": name.rpartition("-")[2],
            "needs": list(needs),
            "made": made.isoformat(timespec="seconds"),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    def records(self, name: str, verdicts: str, task: str, split: str, profile: str) -> str:
        folder = self.path / "records" / name
        folder.mkdir(parents=True)
        write_records(folder / "records.parquet", records(verdicts, task, split, profile=profile))
        return str(folder / "records.parquet")

    def transfer(
        self,
        name: str,
        verdicts: Mapping[str, str],
        *,
        profile: str = PROFILE,
        split: str = "test",
        **given: Any,
    ) -> Path:
        """A transfer whose student has these verdicts on each task."""
        folder = self.artifact("transfers", name, **given)
        task, method, _ = name.split("-")
        scores, files = {}, {}
        for scored, text in verdicts.items():
            found = score([float(verdict == "+") for verdict in text])
            values = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
            scores[scored] = {"transferred": values}
            kept = f"{scored}-{name}"
            files[scored] = {"transferred": self.records(kept, text, scored, split, profile)}
        found = {
            "task": task,
            "method": method,
            "scores": {split: scores},
            "records": {split: files},
        }
        (folder / "scores.json").write_text(json.dumps(found))
        config = {"method": method, "evaluation": {"protocol": "paper", "sampling": None}}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def sweep(self, name: str, trials: Mapping[str, str], best: str | None) -> Path:
        """A sweep whose trials, named `<setting>/<seed>`, have these verdicts on MMLU's test."""
        folder = self.path / "sweeps" / name
        (folder / "finished").mkdir(parents=True)
        lines = ["id,setting,label,seed,base,state"]
        for trial, verdicts in trials.items():
            setting, _, seed = trial.partition("/")
            id = f"{setting}{seed}"
            lines.append(f"{id},{setting},{setting},{seed},False,finished")
            file = self.records(f"mmlu-{name}-{id}", verdicts, "mmlu", "test", PROFILE)
            found = {
                "seconds": 1.0,
                "folder": str(self.path / "transfers" / f"mmlu-sft-{id}"),
                "records": {"mmlu/test": file},
            }
            (folder / "finished" / f"{id}.json").write_text(json.dumps(found))
        (folder / "trials.csv").write_text("\n".join(lines) + "\n")
        (folder / "report.md").write_text("# Sweep\n")
        if best:
            (folder / "best.yaml").write_text(
                f"# trial {best}: x\nevaluation: {{protocol: paper}}\n"
            )
        return folder


@pytest.fixture
def work(tmp_path: Path) -> Work:
    (tmp_path / "work").mkdir()
    return Work(tmp_path / "work")
