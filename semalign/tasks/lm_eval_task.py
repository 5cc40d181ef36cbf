"""Any task of lm_eval, by its name or from its YAML: its requests, and its own metrics.

lm_eval builds the requests (few-shot examples too) when a split is read, and judges the answers;
our engines answer. Rows are those of `<root>/<task>/<split>.jsonl`, or of the data set
that the task's YAML names.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semalign.config.sections import ROW_FILES
from semalign.errors import UserError, nearest
from semalign.tasks import lm_eval_library
from semalign.tasks.profile import FileProfile
from semalign.tasks.task import Example, Row, Task, TextRequest, Verdict, read_lines, to_json

PREFIX = "lm_eval:"  # of a task's name

_KEYS = re.compile(r"^(doc_to_text|doc_to_target|output_type)\s*:", re.MULTILINE)
_ACCURACIES = ("acc", "acc_norm", "acc_bytes", "exact_match")
_RATIOS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def is_lm_eval_file(text: str) -> bool:
    """Whether a YAML file is a task of lm_eval's."""
    return bool(_KEYS.search(text))


class LmEvalTask(Task):
    """A task of lm_eval."""

    def __init__(self, name: str, yaml: Path) -> None:
        self.name, self.yaml = name, yaml
        self.config = lm_eval_library.read_task(yaml)
        if "output_type" not in self.config and "class" in self.config:
            raise UserError(f"{name}: a task that lm_eval computes in Python; expected a YAML task")
        self.kind = "lm_eval"
        kind = self.config.get("output_type", "generate_until")
        self.description = f"lm_eval's {self.config.get('task', yaml.stem)} ({kind})"
        metrics = self.config.get("metric_list") or [{"metric": "acc"}]
        self.metric = metrics[0]["metric"]
        if not isinstance(self.metric, str):
            raise UserError(f"{name}: metric_list[0] is code; expected the name of a metric")
        if self.metric in _ACCURACIES:
            self.metric = "accuracy"
        self.schema, self.template = {}, ""
        self.definition = json.dumps(self.config, sort_keys=True, default=_source)
        self.profile = FileProfile(definition=self.definition)

    def answer(self, row: Row) -> str:
        return str(row["answer"])

    def request(self, row: Row) -> TextRequest:
        scored = tuple((context, text) for context, text in row["scored"])
        stop, limit = tuple(row["stop"]), int(row["max_tokens"])
        return TextRequest(prompt=row["prompt"], scored=scored, stop=stop, max_tokens=limit)

    def load(self, root: Path, split: str) -> list[Example]:
        source = self.source(root, split)
        state = Path(source).stat().st_mtime_ns if Path(source).is_file() else 0
        return list(_examples(self, root, split, state))

    def source(self, root: Path, split: str) -> str:
        if split.endswith(ROW_FILES):
            return split
        folder = root / self.name.removeprefix(PREFIX)
        files = {
            path.name.removesuffix(suffix): path
            for suffix in ROW_FILES
            for path in folder.glob(f"*{suffix}")
        }
        if split in files:
            return str(files[split])
        if folder.is_dir():
            raise UserError(f"{folder}: no split '{split}'; {nearest(split, files)}")
        data = [self.config.get("dataset_path"), self.config.get("dataset_name")]
        return ":".join(["hub", *map(str, filter(None, data)), split])

    def docs(self, root: Path, split: str) -> list[Row]:
        """The rows of a split, before lm_eval processes them."""
        source = self.source(root, split)
        if not source.startswith("hub:"):
            return [json.loads(line) for _, line in read_lines(Path(source))]
        import datasets

        given = dict(self.config.get("dataset_kwargs") or {})
        given.pop("trust_remote_code", None)
        place, name = self.config.get("dataset_path"), self.config.get("dataset_name")
        if (files := given.get("data_files")) is not None:
            given["data_files"] = _placed(files, self.yaml.parent)
        try:
            data = datasets.load_dataset(place, name, split=split, **given)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{source}: cannot be loaded ({reason}); go online without HF_HUB_OFFLINE, or name "
                f"a root that holds {self.name.removeprefix(PREFIX)}/{split}.jsonl"
            ) from error
        return [json.loads(to_json(row)) for row in data]

    def fewshot_split(self) -> str | None:
        """The split of the few-shot examples, where there are any."""
        shots = self.config.get("num_fewshot") or 0
        given = (self.config.get("fewshot_config") or {}).get("split")
        names = [given, self.config.get("fewshot_split"), self.config.get("training_split"),
                 self.config.get("validation_split")]  # fmt: skip
        return next((name for name in names if name), None) if shots else None

    def verdicts(
        self, rows: Sequence[Row], outputs: Sequence[lm_eval_library.Answer]
    ) -> list[Verdict]:
        found = []
        docs = [row["doc"] for row in rows]
        for extracted, metrics in lm_eval_library.judged(self.config, docs, outputs):
            graded = _graded(*next(iter(metrics.items())))
            right = graded in (0.0, 1.0)
            found.append(
                Verdict(
                    extracted=extracted,
                    correct=graded == 1.0,
                    score=None if right else graded,
                    metrics=to_json(metrics),
                )
            )
        return found

    def totals(self, metrics: Sequence[str]) -> dict[str, float]:
        rows = [json.loads(text) for text in metrics]
        return {
            name: lm_eval_library.aggregated(
                self.config, name, [_tupled(row[name]) for row in rows]
            )
            for name in rows[0]
        }


def _graded(name: str, value: Any) -> float:
    """An item's score from its first metric: of a perplexity, the log-probability of a unit."""
    if name.partition("-")[0] in _RATIOS:
        return float(value[0] / value[1])
    if isinstance(value, int | float):
        return float(value)
    raise UserError(f"lm_eval: metric {name} has no value for an item; name another one first")


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _source(value: Any) -> str:
    """What a function of a task's configuration does, for its identity."""
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return repr(type(value))


def _placed(files: Any, folder: Path) -> Any:
    """Data files by paths that hold in every working folder: those next to the YAML."""
    if isinstance(files, Mapping):
        return {name: _placed(value, folder) for name, value in files.items()}
    if isinstance(files, list):
        return [_placed(value, folder) for value in files]
    beside = folder / str(files)
    return str(beside) if beside.exists() else files


@functools.lru_cache(maxsize=16)
def _examples(task: LmEvalTask, root: Path, split: str, state: int) -> tuple[Example, ...]:
    rows = {split: task.docs(root, split)}
    if (shots := task.fewshot_split()) is not None and shots not in rows:
        rows[shots] = task.docs(root, shots)
    if not rows[split]:
        raise UserError(f"{task.source(root, split)}: no rows")
    made = lm_eval_library.built(task.config, rows, split)
    return tuple(
        Example(
            id=f"{task.name}/{index}",
            task=task.name,
            prompt=row["prompt"],
            answer=row["answer"],
            row=json.loads(to_json(row)),
        )
        for index, row in enumerate(made)
    )


@functools.cache
def make_task(name: str) -> LmEvalTask | None:
    """The task of lm_eval that a name such as `lm_eval:arc_easy` stands for; None for other names.

    Raises UserError for a task that lm_eval does not have.
    """
    if not name.startswith(PREFIX):
        return None
    return LmEvalTask(name, lm_eval_library.find_yaml(name.removeprefix(PREFIX)))
