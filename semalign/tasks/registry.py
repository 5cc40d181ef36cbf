"""The four benchmarks by name."""

from __future__ import annotations

from semalign.errors import UserError, nearest
from semalign.tasks.gsm8k import Gsm8k
from semalign.tasks.humaneval import HumanEval
from semalign.tasks.mbpp import Mbpp
from semalign.tasks.mmlu import Mmlu
from semalign.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (Mmlu(), Gsm8k(), HumanEval(), Mbpp())}


def find_task(name: str) -> Task:
    """The task of that name; UserError with the nearest one otherwise."""
    if name not in TASKS:
        raise UserError(f"task '{name}' is unknown; {nearest(name, TASKS)}")
    return TASKS[name]
