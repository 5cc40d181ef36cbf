"""lm_eval (0.4.13), imported at the first call: its tasks by name, over rows handed to them."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml

from semalign.errors import UserError
from semalign.tasks.task import Row, cut

NO_MATCH = "[invalid]"  # what lm_eval's regex filter returns where it finds nothing

Answer = str | Sequence[tuple[float, bool]]  # a text, or each request's (log-probability, greedy)

_SEED = 1234  # of lm_eval's few-shot examples, where none is given


def find_yaml(name: str) -> Path:
    """The YAML file of a task in lm_eval's own collection, by the task's name.

    Raises UserError for an unknown name, with the nearest one, and for a group of tasks.
    """
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    likely = sorted(folder.glob(f"**/{name}.yaml"))  # most are called by their name
    for path in likely:
        if name in _named(path, "task"):
            return path
    # lm_eval's own index parses every file, which takes minutes.
    tasks: dict[str, Path] = {}
    for path in sorted(folder.glob("**/*.yaml")):
        tasks |= dict.fromkeys(_named(path, "task"), path)
        if name in _named(path, "group"):
            raise UserError(f"lm_eval:{name}: a group of tasks; expected one of its tasks")
    if name not in tasks:
        close = difflib.get_close_matches(name, tasks, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"it has {len(tasks)} others"
        raise UserError(f"lm_eval:{name}: lm_eval has no such task; {hint}")
    return tasks[name]


def _named(path: Path, key: str) -> list[str]:
    """What a YAML file has at the top level under `key`."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return re.findall(rf"^{key}:[ ]*[\"']?([\w.:-]+)[\"']?[ ]*$", text, re.MULTILINE)


def read_task(path: Path) -> dict[str, Any]:
    """The configuration of a task's YAML file, with what it includes."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return dict(load_yaml(path))
    except (OSError, ValueError, ImportError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: lm_eval cannot read it ({error})") from error


def built(config: Mapping[str, Any], rows: Mapping[str, Sequence[Row]], split: str) -> list[Row]:
    """Each item's request of a task of lm_eval: `doc`, `prompt`, `answer`, and either `scored`,
    pairs (context, text), or `stop` and `max_tokens`. `rows` has few-shot examples' split too.
    """
    task = _task(config, rows, split)
    task.build_all_requests()
    made: dict[int, Row] = {}
    for instance in task.instances:
        doc, kind, arguments = instance.doc, instance.request_type, instance.args
        row = made.setdefault(
            instance.doc_id,
            {"doc": doc, "prompt": "", "answer": _target(task, doc), "scored": [], "stop": [],
             "max_tokens": 1},
        )  # fmt: skip
        if kind == "generate_until":
            until = arguments[1].get("until") or []
            row["prompt"], row["stop"] = arguments[0], [until] if isinstance(until, str) else until
            row["max_tokens"] = arguments[1].get("max_gen_toks", 256)
        else:
            pair = ("", arguments[0]) if kind == "loglikelihood_rolling" else arguments
            row["prompt"] = row["prompt"] or pair[0]
            row["scored"].append(list(pair))
    return [made[index] for index in sorted(made)]


def _target(task: Any, doc: Row) -> str:
    target = task.doc_to_target(doc)
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
    return str(choices[target]) if choices and isinstance(target, int) else str(target)


def judged(
    config: Mapping[str, Any], docs: Sequence[Row], outputs: Sequence[Answer]
) -> list[tuple[str | None, dict[str, Any]]]:
    """What lm_eval extracts from each item's output, and its metrics; those of a filter are called
    by the filter too. The first metric is the first of the task, by its first filter.
    """
    plain = {**config, "process_docs": None, "num_fewshot": 0, "fewshot_config": None}
    task = _task({**plain, "fewshot_split": None}, {"test": docs}, "test")
    task.build_all_requests()
    by_doc: dict[int, list[Any]] = {}
    for instance in task.instances:
        output = outputs[instance.doc_id]
        rolling = instance.request_type == "loglikelihood_rolling"
        if isinstance(output, str):
            until = instance.args[1].get("until") or []
            instance.resps = [cut(output, [until] if isinstance(until, str) else until)]
        else:
            found = output[instance.idx]
            instance.resps = [found[0] if rolling else found]
        by_doc.setdefault(instance.doc_id, []).append(instance)
    task.apply_filters()
    result: list[tuple[str | None, dict[str, Any]]] = []
    for index, doc in enumerate(task.eval_docs):
        requests, metrics, extracted = by_doc[index], {}, None
        for place, name in enumerate(requests[0].filtered_resps):
            answers = [request.filtered_resps[name] for request in requests]
            for metric, value in task.process_results(doc, answers).items():
                metrics[metric if name == "none" else f"{metric}-{name}"] = value
            if place == 0 and isinstance(answers[0], str):
                extracted = None if answers[0] == NO_MATCH else answers[0]
            elif place == 0 and len(answers) > 1:
                best = max(range(len(answers)), key=lambda at: answers[at][0])
                extracted = requests[best].args[1].strip()
        result.append((extracted, metrics))
    return result


def aggregated(config: Mapping[str, Any], metric: str, values: Sequence[Any]) -> float:
    """lm_eval's aggregate of one metric over the items: mostly their mean."""
    from lm_eval.api.registry import get_aggregation, get_metric_aggregation

    for given in config.get("metric_list") or []:
        if metric == given["metric"] or metric.startswith(f"{given['metric']}-"):
            how = given.get("aggregation") or get_metric_aggregation(given["metric"])
            return float((get_aggregation(how) if isinstance(how, str) else how)(values))
    return float(get_aggregation("mean")(values))


def _task(config: Mapping[str, Any], rows: Mapping[str, Sequence[Row]], split: str) -> Any:
    docs = {name: library().dataset(list(part)) for name, part in rows.items()}
    fixed = {"test_split": split, "custom_dataset": lambda **_: docs}
    given = {key: value for key, value in config.items() if value is not None}
    others = [key for key in ("training_split", "validation_split") if config.get(key) not in docs]
    task = library().task(
        config={**{key: value for key, value in given.items() if key not in others}, **fixed}
    )
    task.set_fewshot_seed(_SEED)
    return task


@dataclass(frozen=True, kw_only=True)
class Library:
    """The parts of lm_eval in use, imported once a process."""

    task: Callable[..., Any]
    evaluate: Callable[..., Any]
    dataset: Callable[..., Any]
    answers: Callable[[Sequence[Any]], Any]


@lru_cache
def library() -> Library:
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
        """A model whose outputs are known; row and choice identify the one requested."""

        def __init__(self, outputs: Sequence[Any]) -> None:
            super().__init__()
            self.outputs = outputs

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [cut(self.outputs[it.doc_id], it.args[1]["until"]) for it in requests]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            # Whether it is greedy decoding's output is not known, and no metric here uses it.
            return [(self.outputs[it.doc_id][it.idx], False) for it in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError("no task here needs perplexities")

    return Library(
        task=task.ConfigurableTask, evaluate=evaluate, dataset=Dataset.from_list, answers=Answers
    )
