"""The tasks by name: the four benchmarks, and those that users register."""

from __future__ import annotations

from semalign.registry import Registry
from semalign.tasks.gsm8k import Gsm8k
from semalign.tasks.humaneval import HumanEval
from semalign.tasks.lm_eval_task import make_task
from semalign.tasks.mbpp import Mbpp
from semalign.tasks.mmlu import Mmlu
from semalign.tasks.task import Task

TASKS: Registry[Task] = Registry("task", made=make_task)


def register_task(task: Task) -> Task:
    """Add a task under its name, or replace the one of that name; returns it."""
    return TASKS.register(task.name, task)


for _task in (Mmlu(), Gsm8k(), HumanEval(), Mbpp()):
    register_task(_task)

BUILT_IN = tuple(TASKS)


def find_task(name: str) -> Task:
    """The task of that name; UserError with the nearest one otherwise."""
    return TASKS.find(name)
