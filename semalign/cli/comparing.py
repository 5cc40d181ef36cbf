"""Finished runs on the same items: scores, and the paired test against the first."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from semalign.artifacts.records import Record, item_scores, read_records
from semalign.cli.folder import Entry, read
from semalign.cli.tables import print_table
from semalign.core.statistics import compare, score
from semalign.errors import UserError
from semalign.report.compare import line
from semalign.report.table import cell
from semalign.tasks import find_task
from semalign.tasks.protocols import find_protocol

_Key = tuple[str, str]  # split, task


@dataclass(frozen=True)
class Contender:
    """A run's transferred students, one a seed: the records of each split and task, and the
    evaluation's settings.
    """

    name: str
    records: Mapping[_Key, Sequence[Sequence[Record]]]
    evaluation: Mapping[str, Any]

    def items(self, key: _Key) -> dict[str, float]:
        """Each item's score by its id, averaged over the seeds."""
        k = _k(self.evaluation, key[1])
        runs = [item_scores(rows, k=k) for rows in self.records[key]]
        return {id: statistics.fmean(run[id] for run in runs) for id in runs[0]}

    def profile(self, key: _Key) -> str:
        """How the answers were made and judged."""
        return ", ".join(sorted({r.profile for rows in self.records[key] for r in rows}))


def _k(evaluation: Mapping[str, Any], task: str) -> int:
    """The k of pass@k."""
    protocol, sampling = (
        find_protocol(evaluation.get("protocol", "paper")),
        evaluation.get("sampling"),
    )
    return (protocol.sampled(**sampling) if sampling else protocol).profile(task).k


def contender(entry: Entry) -> Contender:
    """The records of a finished run. Raises UserError when it is not finished, and for a sweep that
    chooses nothing.
    """
    if not entry.finished:
        raise UserError(f"{entry.name}: not finished; the same command again goes on with it")
    return _sweep(entry) if entry.kind == "sweeps" else _transfer(entry)


def _transfer(entry: Entry) -> Contender:
    found = read(entry.path / "scores.json")
    if found is None:
        raise UserError(f"{entry.name}: it has no scores.json, so it was not scored; run it again")
    records = {
        (split, task): [_records(entry, files["transferred"])]
        for split, tasks in found["records"].items()
        for task, files in tasks.items()
    }
    config = read(entry.path / "config.json") or {}
    return Contender(entry.name, records, config.get("evaluation", {}))


def _sweep(entry: Entry) -> Contender:
    best = entry.path / "best.yaml"
    named = re.match(r"# trial (\S+):", best.read_text(encoding="utf-8")) if best.exists() else None
    if named is None:
        raise UserError(f"{entry.name}: the sweep has chosen no setting; see its report.md")
    with (entry.path / "trials.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    [setting] = [row["setting"] for row in rows if row["id"] == named[1]]
    trials = [
        entry.trials[r["id"]] for r in rows if r["setting"] == setting and r["id"] in entry.trials
    ]
    records: dict[_Key, list[list[Record]]] = {}
    for trial in trials:
        for name, file in trial["records"].items():
            task, _, split = name.partition("/")
            records.setdefault((split, task), []).append(_records(entry, file))
    config = yaml.safe_load(best.read_text(encoding="utf-8"))
    return Contender(entry.name, records, config.get("evaluation", {}))


def _records(entry: Entry, file: str) -> list[Record]:
    """The records of a file that is named absolutely, or relative to its run or work folder; a work
    folder may have been moved.
    """
    work = entry.path.parents[1]
    parts = Path(file).parts
    moved = work.joinpath(*parts[parts.index("records") :]) if "records" in parts else work / file
    for path in (entry.path / file, work / file, moved):  # an absolute one stays as it is
        if path.exists():
            return read_records(path)
    raise UserError(f"{file}: the records of {entry.name} are missing; run it again")


def show_comparison(runs: Sequence[Contender]) -> None:
    """Print, for each split and task that the first shares with another, scores and tests.

    Raises UserError when two runs were scored under different profiles, or on other items.
    """
    first, *others = runs
    shared = [key for key in first.records if any(key in other.records for other in others)]
    if not shared:
        raise UserError(f"{first.name}: no other run was scored on one of its tasks and splits")
    for split, task in shared:
        key, rows = (split, task), []
        for run in (run for run in runs if key in run.records):
            values = list(run.items(key).values())
            rows.append(
                [run.name, cell(score(values)), str(len(values)), str(len(run.records[key]))]
            )
        print_table(f"{task}, {split}", ["run", "score (95%)", "items", "seeds"], rows)
        for run in (run for run in others if key in run.records):
            print(_paired(first, run, key))
        print()


def _paired(first: Contender, second: Contender, key: _Key) -> str:
    profiles = first.profile(key), second.profile(key)
    if profiles[0] != profiles[1]:
        raise UserError(
            f"{first.name} was scored under {profiles[0]} and {second.name} under {profiles[1]}: "
            "their scores do not compare; evaluate both under the same profile"
        )
    found = compare(first.items(key), second.items(key), metric=find_task(key[1]).metric)
    return line(first.name, second.name, found)
