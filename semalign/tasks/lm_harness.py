"""lm_eval as a library: its request for a row, and its verdict on the output of our engines.

lm_eval (0.4.13) builds the requests and computes filters and metrics; the model it evaluates holds
outputs that were generated before. The lm_eval task of a benchmark is its `Task.library`: those of
semalign/tasks/lm_eval are ``mmlu`` and ``gsm8k_cot_zeroshot``, over rows in memory. lm_eval is
imported at the first call, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from semalign.errors import UserError, nearest
from semalign.tasks.lm_eval_library import NO_MATCH, library
from semalign.tasks.profile import LIBRARY, LibraryTask
from semalign.tasks.registry import TASKS
from semalign.tasks.task import Row

Output = str | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class LibraryRequest:
    """lm_eval's request for one row.

    With ``choices`` (continuations of the prompt, leading space included) it is for their
    log-probabilities; else for the text generated greedily up to a stop string, of at most
    ``max_tokens`` tokens.
    """

    prompt: str
    choices: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    max_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class LibraryVerdict:
    """The answer that lm_eval extracts from one output, and whether it is correct.

    ``other`` holds the verdicts by the filters that do not count.
    """

    extracted: str | None
    correct: bool
    other: dict[str, bool] = field(default_factory=dict)


def library_requests(task: str, rows: Sequence[Row]) -> list[LibraryRequest]:
    """One request a row, in order; UserError for a task that lm_eval has no definition of."""
    if not rows:
        return []
    built = _built(task, rows)
    built.build_all_requests()
    found: dict[int, LibraryRequest] = {}
    for instance in built.instances:
        prompt, wanted = instance.args
        if instance.request_type == "loglikelihood":
            before = found[instance.doc_id].choices if instance.idx else ()
            found[instance.doc_id] = LibraryRequest(prompt=prompt, choices=(*before, wanted))
        else:
            stop, limit = tuple(wanted["until"]), wanted["max_gen_toks"]
            found[instance.doc_id] = LibraryRequest(prompt=prompt, stop=stop, max_tokens=limit)
    return [found[index] for index in range(len(rows))]


def library_verdicts(
    task: str, rows: Sequence[Row], outputs: Sequence[Output]
) -> list[LibraryVerdict]:
    """lm_eval's verdict on one output a row: the text, or the log-probability of each choice.

    Text is cut at the first stop string, as lm_eval's own models do. Raises UserError as
    `library_requests` does.
    """
    if len(rows) != len(outputs):
        raise ValueError(f"{len(rows)} rows, {len(outputs)} outputs")
    if not rows:
        return []
    evaluated = library().evaluate(
        lm=library().answers(outputs),
        task_dict={"tasks": {task: _built(task, rows)}, "groups": {}},
        bootstrap_iters=0,  # no standard errors
    )
    counted = _library_task(task)
    verdicts: list[dict[str, bool]] = [{} for _ in rows]
    extracted: list[str | None] = [None for _ in rows]
    for sample in evaluated["samples"][task]:
        index = sample["doc_id"]
        verdicts[index][sample["filter"]] = bool(sample[counted.metric])
        if sample["filter"] == counted.filter:
            extracted[index] = _extracted(sample)
    return [
        LibraryVerdict(extracted=answer, correct=verdict.pop(counted.filter), other=verdict)
        for answer, verdict in zip(extracted, verdicts, strict=True)
    ]


def _extracted(sample: dict[str, Any]) -> str | None:
    found = sample["filtered_resps"]
    if isinstance(found[0], str):
        return None if found[0] == NO_MATCH else found[0]
    scores = [score for score, _ in found]
    best = scores.index(max(scores))  # the first of equals, as numpy's argmax
    choice: str = sample["arguments"][best][1]
    return choice.strip()


def _library_task(name: str) -> LibraryTask:
    found = TASKS[name].library
    if found is None:
        known = [task.name for task in TASKS.values() if task.library]
        raise UserError(f"protocol lm-eval has no task '{name}'; {nearest(name, known)}")
    return found


def _built(name: str, rows: Sequence[Row]) -> Any:
    """lm_eval's task object over these rows, of which it sees the benchmark's fields only."""
    definition = (LIBRARY / _library_task(name).file).read_text(encoding="utf-8")
    wanted = [{key: row[key] for key in TASKS[name].fields} for row in rows]
    docs = {"test": library().dataset(wanted)}
    config = yaml.safe_load(definition)
    return library().task(config={**config, "custom_dataset": lambda **_: docs})
