"""Evaluation: which items still need records, the loop that makes them, and the scores.

Judged batches are kept on disk, so that a run that was killed goes on with the missing items.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from semalign.artifacts.records import Journal, Record, content_key, item_scores, read_records
from semalign.core.statistics import Score, score
from semalign.engine.dispatch import Candidate, Unit, dispatch
from semalign.engine.generation import EngineShape
from semalign.models.fingerprints import model_fingerprint, tokenizer_fingerprint
from semalign.models.loading import load_tokenizer
from semalign.models.peft_folder import adapter_fingerprint, check_adapter
from semalign.sandbox.run import require_tier
from semalign.stages.scoring import SandboxLimits, check_chat_template
from semalign.tasks import TASKS, Example, find_task, load_split
from semalign.tasks.protocols import Protocol

__all__ = ["Candidate", "Evaluation", "check", "evaluate"]

Key = tuple[str, str, str]  # candidate, task, split


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Per (candidate, task, split): the records, their Parquet file and the score."""

    protocol: Protocol
    records: dict[Key, list[Record]]
    files: dict[Key, Path]
    scores: dict[Key, Score]
    generated: int  # items answered now; the others' records were already there
    seconds: float


def evaluate(
    candidates: Sequence[Candidate],
    *,
    tasks: Sequence[str],
    splits: Sequence[str],
    root: Path,
    folder: Path,
    shape: EngineShape,
    sandbox: SandboxLimits,
    protocol: Protocol,
    engines: Mapping[str, Sequence[Any]] | None = None,
) -> Evaluation:
    """Score every candidate on every task and split; needs a running Ray.

    ``engines`` that run already, by model, are used and left running.

    Records go to ``folder``, one Parquet file a candidate, task and split, named by everything that
    decides them; items already there are not asked again. Raises UserError for bad input, and for a
    machine whose sandbox is weaker than asked.
    """
    begin = time.monotonic()
    check(candidates, tasks, protocol, sandbox, trust_remote_code=shape.trust_remote_code)
    data = {(task, split): load_split(root, task, split) for task in tasks for split in splits}
    name = partial(_file_name, shape=shape, sandbox=sandbox, protocol=protocol)
    units = {
        (candidate.name, task, split): Unit(
            candidate,
            split,
            examples,
            Journal(
                folder / name(candidate, examples, split), [example.id for example in examples]
            ),
        )
        for candidate in candidates
        for (task, split), examples in data.items()
    }
    todo = [unit for unit in {unit.file: unit for unit in units.values()}.values() if unit.missing]
    generated = sum(len(unit.missing) for unit in todo)
    if todo:
        folder.mkdir(parents=True, exist_ok=True)
        dispatch(todo, shape, sandbox, protocol, engines or {})
    records = {key: read_records(unit.file) for key, unit in units.items()}
    return Evaluation(
        protocol=protocol,
        records=records,
        files={key: unit.file for key, unit in units.items()},
        scores={
            key: score(list(item_scores(rows, k=protocol.profile(key[1]).k).values()))
            for key, rows in records.items()
        },
        generated=generated,
        seconds=time.monotonic() - begin,
    )


def check(
    candidates: Sequence[Candidate],
    tasks: Sequence[str],
    protocol: Protocol,
    sandbox: SandboxLimits,
    *,
    trust_remote_code: bool = False,
) -> None:
    """What can be refused before anything is generated; raises UserError."""
    kinds = [find_task(task).kind for task in tasks]
    profiles = [protocol.profile(task) for task in tasks]
    if "code" in kinds:
        require_tier(sandbox.min_tier)
    for candidate in candidates:
        if any(profile.chat == "template" for profile in profiles):
            check_chat_template(
                load_tokenizer(candidate.model, trust_remote_code=trust_remote_code)
            )
        if candidate.adapter:
            check_adapter(candidate.adapter, candidate.model, trust_remote_code=trust_remote_code)


def _file_name(
    candidate: Candidate,
    examples: list[Example],
    split: str,
    *,
    shape: EngineShape,
    sandbox: SandboxLimits,
    protocol: Protocol,
) -> str:
    task = examples[0].task
    key = content_key(
        examples,
        split,
        profile=protocol.label(task),
        model=[model_fingerprint(candidate.model), tokenizer_fingerprint(candidate.model)],
        adapter=candidate.adapter and adapter_fingerprint(candidate.adapter),
        dtype=candidate.dtype or shape.dtype,
        max_model_len=shape.max_model_len,
        min_tier=sandbox.min_tier if TASKS[task].kind == "code" else None,
    )
    return f"{task}-{split}-{key[:20]}.parquet"
