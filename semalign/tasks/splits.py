"""Named splits: a file of one's own, the file a benchmark was published as, or the hub's rows.

A published split is read whole or not at all: a file that lacks a row, or has one too many, would
give a score that looks like the benchmark's and is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from semalign.errors import UserError, nearest
from semalign.tasks.registry import TASKS, find_task
from semalign.tasks.task import Example, Row, _parse, read_rows

HUB = Path("hub")  # as a root: the Hugging Face hub (a folder of that name is ./hub, made absolute)
_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A benchmark as its authors published it, and its dataset (id, configuration) on the hub.

    ``splits`` holds the numbers of each split's rows: those in the ids where rows have ids of their
    own, places in the file otherwise. ``file`` is what the one file of all splits is called, and
    None where each split has a file of its own.
    """

    hub: tuple[str, str]
    prefix: str
    splits: Mapping[str, range]
    file: str | None = None

    def ids(self, splits: Sequence[str]) -> list[str]:
        """The ids of the examples of these splits."""
        numbers = chain.from_iterable(self.splits[split] for split in splits)
        return [f"{self.prefix}/{number}" for number in numbers]


# Sizes and id ranges: Chen et al. 2021 for HumanEval, Austin et al. 2021 (README of the data) for
# MBPP, Cobbe et al. 2021 for GSM8K, Hendrycks et al. 2021 for MMLU.
PUBLISHED: dict[str, Published] = {
    "humaneval": Published(
        hub=("openai/openai_humaneval", "openai_humaneval"),
        file="HumanEval",
        prefix="HumanEval",
        splits={"test": range(164)},
    ),
    "mbpp": Published(
        hub=("google-research-datasets/mbpp", "full"),
        file="mbpp",
        prefix="mbpp",
        splits={
            "prompt": range(1, 11),
            "test": range(11, 511),
            "validation": range(511, 601),
            "train": range(601, 975),
        },
    ),
    "gsm8k": Published(
        hub=("openai/gsm8k", "main"),
        prefix="gsm8k",
        splits={"train": range(7473), "test": range(1319)},
    ),
    "mmlu": Published(
        hub=("cais/mmlu", "all"),
        prefix="mmlu",
        splits={"test": range(14042), "validation": range(1531), "dev": range(285)},
    ),
}


def split_path(root: Path, task: str, split: str) -> Path:
    """The file that holds one split: ``<root>/<task>/<split>.jsonl`` or ``.jsonl.gz``, else the
    published file of all splits, such as ``<root>/mbpp/mbpp.jsonl``.

    Raises UserError with the nearest split there is.
    """
    find_task(task)
    folder, published = Path(root) / task, PUBLISHED[task]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one holding {split}.jsonl")
    found: dict[str, Path] = {}
    # Own splits come before those of the published file, plain files before compressed ones.
    paths = [path for suffix in _SUFFIXES for path in folder.glob(f"*{suffix}") if path.is_file()]
    for path in sorted(paths, key=lambda path: _stem(path) == published.file):
        held = published.splits if _stem(path) == published.file else [_stem(path)]
        found = dict.fromkeys(held, path) | found
    if split in found:
        return found[split]
    hint = nearest(split, found) if found else "the folder holds no .jsonl file"
    raise UserError(f"{folder}: no split '{split}'; {hint}")


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def split_source(root: Path, task: str, split: str) -> str:
    """Where a split comes from, to be recorded: a path, or ``hub:<id>:<configuration>:<split>``.

    Raises UserError when there is no such split.
    """
    if Path(root) != HUB:
        return str(split_path(root, task, split))
    find_task(task)
    published = PUBLISHED[task]
    if split not in published.splits:
        hint = nearest(split, published.splits)
        raise UserError(f"{task} on the hub: no split '{split}'; {hint}")
    return ":".join(("hub", *published.hub, split))


def load_split(root: Path, task: str, split: str) -> list[Example]:
    """All examples of one split, in the order of the file.

    ``root`` is a folder, or HUB for the Hugging Face hub. Raises UserError when the split is
    missing, empty or not whole, when a row is malformed and when an id is repeated.
    """
    source = split_source(root, task, split)
    published = PUBLISHED[task]
    if Path(root) == HUB:
        examples = _examples(task, _hub_rows(task, split, source), source)
        _check_whole(examples, published.ids([split]), source)
        return examples
    examples = _examples(task, read_rows(Path(source), TASKS[task]), source)
    if _stem(Path(source)) != published.file:
        return examples
    _check_whole(examples, published.ids(list(published.splits)), source)
    wanted = set(published.ids([split]))
    return [example for example in examples if example.id in wanted]


def _examples(task: str, rows: Sequence[Row], source: str) -> list[Example]:
    examples = [TASKS[task].example(row, index) for index, row in enumerate(rows)]
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise UserError(f"{source}: id '{example.id}' occurs twice; ids must be unique")
        seen.add(example.id)
    return examples


def _check_whole(examples: Sequence[Example], expected: Sequence[str], source: str) -> None:
    found = {example.id for example in examples}
    wrong = [f"'{id}' is missing" for id in expected if id not in found]
    wrong += [f"'{id}' is not one of them" for id in sorted(found.difference(expected))]
    if wrong:
        raise UserError(
            f"{source}: expected the {len(expected)} published rows, found {len(found)}: {wrong[0]}"
        )


def _hub_rows(task: str, split: str, source: str) -> list[Row]:
    """The rows of a published split on the hub, each held to the checks of a row in a file.

    Raises UserError when the hub cannot be reached and the split was not downloaded before.
    """
    import datasets

    name, configuration = PUBLISHED[task].hub
    try:
        data = datasets.load_dataset(name, configuration, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{source}: cannot be loaded ({reason}); go online without HF_HUB_OFFLINE, or name "
            f"a folder that holds {task}/{split}.jsonl"
        ) from error
    return [_parse(json.dumps(row), f"{source}:{i}", TASKS[task]) for i, row in enumerate(data, 1)]
