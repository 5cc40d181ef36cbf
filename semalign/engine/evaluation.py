"""Evaluation: which items still need records, who makes them, and the scores."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semalign.artifacts.artifact import MANIFEST, Workspace
from semalign.artifacts.records import Record, item_scores, read_records, shares
from semalign.config.sections import Evaluation as Settings
from semalign.core.statistics import Score, score
from semalign.data.root import check_splits, scored_examples
from semalign.engine.limits import check_engine, check_targets
from semalign.errors import UserError
from semalign.models.peft_folder import LARGEST_RANK, adapter_config, adapter_rank, check_adapter
from semalign.stages.judged import Candidate, Records, Served, Unit
from semalign.stages.questions import check_questions
from semalign.stages.references import check_references
from semalign.stages.scoring import chosen_protocol
from semalign.tasks.protocols import Protocol

ScoreKey = tuple[str, str, str]  # candidate, task, split


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Per (candidate, task, split): the records, their Parquet file, the score and its limits."""

    protocol: Protocol
    records: dict[ScoreKey, list[Record]]
    files: dict[ScoreKey, Path]
    scores: dict[ScoreKey, Score]
    shares: dict[ScoreKey, dict[str, float]]  # what limits the score: see `shares`
    generated: int  # items answered now; the others' records were cached
    seconds: float


def score_all(
    candidates: Sequence[Candidate],
    settings: Settings,
    *,
    root: Path,
    workspace: Workspace,
    engines: Mapping[Served, Sequence[Any]] | None = None,
    judge_cpus: float = 1,
    local: bool = False,
) -> Scored:
    """Score every candidate on every task and split; needs a running Ray, unless `local`.

    `engines` that run already are used and left running. Who calls from a process that holds CPUs
    of Ray's must not wait for others: `judge_cpus=0`.

    Records are named by everything that decides them; items that have theirs are not answered
    again. Raises UserError for bad input, and for a sandbox weaker than `sandbox.min_tier`.
    """
    begin = time.monotonic()
    protocol = chosen_protocol(settings)
    check(candidates, settings, root=root, work=workspace.path)
    wanted = wanted_records(candidates, settings, root)
    places = {key: workspace.place(records) for key, records in wanted.items()}
    units = {key: Unit(records, records.journal(places[key])) for key, records in wanted.items()}
    todo = [unit for unit in {u.journal.file: u for u in units.values()}.values() if unit.missing]
    generated = sum(len(unit.missing) for unit in todo)
    if todo and local:
        from semalign.engine.local_engine import answer_here

        answer_here(todo, settings)
    elif todo:
        from semalign.engine.dispatch import dispatch

        dispatch(todo, settings, engines or {}, judge_cpus=judge_cpus)
    found = {key: read_records(unit.journal.file) for key, unit in units.items()}
    limits = {key: shares(rows) for key, rows in found.items()}
    for key, records in wanted.items():
        if not (places[key] / MANIFEST).exists():
            items = {"scored": settings.limited or "all items"}
            workspace.finish(
                records, places[key], {**limits[key], **items}, time.monotonic() - begin
            )
    return Scored(
        protocol=protocol,
        records=found,
        files={key: unit.journal.file for key, unit in units.items()},
        scores={
            key: score(list(item_scores(rows, k=protocol.profile(key[1]).k).values()))
            for key, rows in found.items()
        },
        shares=limits,
        generated=generated,
        seconds=time.monotonic() - begin,
    )


def wanted_records(
    candidates: Sequence[Candidate], settings: Settings, root: Path
) -> dict[ScoreKey, Records]:
    """The records of every candidate, task and split, made or not."""
    protocol = chosen_protocol(settings)
    check_splits((root, task, split) for task in settings.tasks for split in settings.splits)
    data = {
        (task, split): scored_examples(settings, root, task, split)
        for task in settings.tasks
        for split in settings.splits
    }
    return {
        (candidate.name, task, split): Records(
            candidate=candidate,
            task=task,
            split=split,
            examples=examples,
            protocol=protocol,
            max_model_len=settings.max_model_len,
            min_tier=settings.sandbox.min_tier,
        )
        for candidate in candidates
        for (task, split), examples in data.items()
    }


def check(candidates: Sequence[Candidate], settings: Settings, *, root: Path, work: Path) -> None:
    """What can be refused before anything is generated; raises UserError."""
    check_questions(
        {candidate.model.path: candidate.model for candidate in candidates}.values(), settings, root
    )
    for candidate in candidates:
        model = candidate.model
        check_engine(model, settings)
        if candidate.adapter:
            check_adapter(candidate.adapter, model.path, trust_remote_code=model.trust_remote_code)
            given = adapter_config(candidate.adapter).get("target_modules") or ()
            targets = (given,) if isinstance(given, str) else given  # a pattern, or names
            check_targets(model, targets, settings, f"adapter {candidate.adapter}")
            if (rank := adapter_rank(candidate.adapter)) > LARGEST_RANK:
                raise UserError(
                    f"adapter {candidate.adapter}: rank {rank}; vLLM serves at most {LARGEST_RANK}"
                )
    check_references(settings, root, work)  # last, for it runs programs
