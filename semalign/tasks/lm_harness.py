"""lm_eval as a library: what it asks of a row, and how it judges what our engines answered.

lm_eval (0.4.13) builds the requests and computes filters and metrics; the model it evaluates holds
answers that are there already. The tasks are semalign/tasks/lm_eval/*.yaml: ``mmlu`` and
``gsm8k_cot_zeroshot``, over rows in memory. lm_eval is imported at the first call, not before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import yaml

from semalign.errors import UserError, nearest
from semalign.tasks import TASKS, Row
from semalign.tasks.protocols import LIBRARY
from semalign.tasks.task import cut

Output = str | tuple[float, ...]

# The metric and the filter that count, as in lm_eval's table of results.
_SCORES = {"mmlu": ("acc", "none"), "gsm8k": ("exact_match", "flexible-extract")}
_NO_MATCH = "[invalid]"  # what lm_eval's regex filter says where it finds nothing


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What lm_eval wants to know of one row.

    With ``choices`` (continuations of the prompt, leading space included) their log-probabilities;
    else the text generated greedily up to a stop string, of at most ``max_tokens`` tokens.
    """

    prompt: str
    choices: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    max_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Judged:
    """lm_eval's answer and verdict on one row; ``other``: by the filters that do not count."""

    extracted: str | None
    correct: bool
    other: dict[str, bool] = field(default_factory=dict)


def ask(task: str, rows: Sequence[Row]) -> list[Asked]:
    """One request a row, in order; UserError for a task that has no definition here."""
    if not rows:
        return []
    built = _task(task, rows)
    built.build_all_requests()
    asked: dict[int, Asked] = {}
    for instance in built.instances:
        prompt, wanted = instance.args
        if instance.request_type == "loglikelihood":
            before = asked[instance.doc_id].choices if instance.idx else ()
            asked[instance.doc_id] = Asked(prompt=prompt, choices=(*before, wanted))
        else:
            stop, limit = tuple(wanted["until"]), wanted["max_gen_toks"]
            asked[instance.doc_id] = Asked(prompt=prompt, stop=stop, max_tokens=limit)
    return [asked[index] for index in range(len(rows))]


def judge(task: str, rows: Sequence[Row], outputs: Sequence[Output]) -> list[Judged]:
    """lm_eval's verdict on one output a row: the text, or the log-probability of each choice.

    Text is cut at the first stop string, as lm_eval's own models do. UserError as for `ask`.
    """
    if len(rows) != len(outputs):
        raise ValueError(f"{len(rows)} rows, {len(outputs)} outputs")
    if not rows:
        return []
    evaluated = _library().evaluate(
        lm=_library().answers(outputs),
        task_dict={"tasks": {task: _task(task, rows)}, "groups": {}},
        bootstrap_iters=0,  # no standard errors
    )
    metric, counted = _SCORES[task]
    verdicts: list[dict[str, bool]] = [{} for _ in rows]
    extracted: list[str | None] = [None for _ in rows]
    for sample in evaluated["samples"][task]:
        index = sample["doc_id"]
        verdicts[index][sample["filter"]] = bool(sample[metric])
        if sample["filter"] == counted:
            extracted[index] = _extracted(sample)
    return [
        Judged(extracted=answer, correct=verdict.pop(counted), other=verdict)
        for answer, verdict in zip(extracted, verdicts, strict=True)
    ]


def _extracted(sample: dict[str, Any]) -> str | None:
    found = sample["filtered_resps"]
    if isinstance(found[0], str):
        return None if found[0] == _NO_MATCH else found[0]
    scores = [score for score, _ in found]
    best = scores.index(max(scores))  # the first of equals, as numpy's argmax
    choice: str = sample["arguments"][best][1]
    return choice.strip()


def _task(name: str, rows: Sequence[Row]) -> Any:
    """lm_eval's task object over these rows, of which it sees the benchmark's fields only."""
    if name not in _SCORES:
        raise UserError(f"protocol lm-eval has no task '{name}'; {nearest(name, _SCORES)}")
    library = _library()
    wanted = [{key: row[key] for key in TASKS[name].fields} for row in rows]
    docs = {"test": library.dataset(wanted)}
    config = yaml.safe_load((LIBRARY / f"{name}.yaml").read_text(encoding="utf-8"))
    return library.task(config={**config, "custom_dataset": lambda **_: docs})


@dataclass(frozen=True, kw_only=True)
class _Library:
    """The parts of lm_eval in use, imported once a process."""

    task: Callable[..., Any]
    evaluate: Callable[..., Any]
    dataset: Callable[..., Any]
    answers: Callable[[Sequence[Output]], Any]


@lru_cache
def _library() -> _Library:
    from datasets import Dataset
    from lm_eval import utils
    from lm_eval.api import task
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task.tqdm = partial(task.tqdm, disable=True)
    # Compiled anew for every row otherwise: 17 s instead of 1 s for the 14,042 rows of MMLU.
    utils.env.from_string = lru_cache(utils.env.from_string)

    class Answers(LM):
        """A model whose answers are known; row and choice say which one is asked for."""

        def __init__(self, outputs: Sequence[Any]) -> None:
            super().__init__()
            self.outputs = outputs

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [cut(self.outputs[it.doc_id], it.args[1]["until"]) for it in requests]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            # Whether greedy decoding would say it is not known, and no metric here uses it.
            return [(self.outputs[it.doc_id][it.idx], False) for it in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError("no task here asks for perplexities")

    return _Library(
        task=task.ConfigurableTask, evaluate=evaluate, dataset=Dataset.from_list, answers=Answers
    )
