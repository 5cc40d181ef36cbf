"""The four benchmarks, and reading a named split of one of them."""

from __future__ import annotations

from pathlib import Path

from semalign.errors import UserError, nearest
from semalign.tasks.gsm8k import Gsm8k
from semalign.tasks.humaneval import HumanEval
from semalign.tasks.mbpp import Mbpp
from semalign.tasks.mmlu import Mmlu
from semalign.tasks.task import Example, Row, Task, read_rows

__all__ = ["TASKS", "Example", "Row", "Task", "find_task", "load_split", "read_rows", "split_path"]

TASKS: dict[str, Task] = {task.name: task for task in (Mmlu(), Gsm8k(), HumanEval(), Mbpp())}
_SUFFIXES = (".jsonl", ".jsonl.gz")


def find_task(name: str) -> Task:
    """The task of that name; UserError with the nearest one otherwise."""
    if name not in TASKS:
        raise UserError(f"task '{name}' is unknown; {nearest(name, TASKS)}")
    return TASKS[name]


def split_path(root: Path, task: str, split: str) -> Path:
    """The file of one split, ``<root>/<task>/<split>.jsonl`` or ``.jsonl.gz``."""
    find_task(task)
    folder = Path(root) / task
    for suffix in _SUFFIXES:
        if (path := folder / f"{split}{suffix}").is_file():
            return path
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one holding {split}.jsonl")
    found = sorted({p.name.split(".jsonl")[0] for s in _SUFFIXES for p in folder.glob(f"*{s}")})
    hint = nearest(split, found) if found else "the folder holds no .jsonl file"
    raise UserError(f"{folder}: no split '{split}'; {hint}")


def load_split(root: Path, task: str, split: str) -> list[Example]:
    """All examples of one split, in file order.

    Raises UserError when the split is missing or empty, a row is malformed or an id is repeated.
    """
    path = split_path(root, task, split)
    rows = read_rows(path, TASKS[task])
    examples = [TASKS[task].example(row, index) for index, row in enumerate(rows)]
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise UserError(f"{path}: id '{example.id}' occurs twice; ids must be unique")
        seen.add(example.id)
    return examples
