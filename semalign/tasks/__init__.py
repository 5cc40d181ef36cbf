"""The tasks by name, and reading a named split of one of them."""

from semalign.tasks.profile import Profile
from semalign.tasks.registry import TASKS, find_task, register_task
from semalign.tasks.splits import HUB, load_split, split_path, split_source
from semalign.tasks.task import AnswerReader, Example, Row, Task, read_rows

__all__ = [
    "HUB",
    "TASKS",
    "AnswerReader",
    "Example",
    "Profile",
    "Row",
    "Task",
    "find_task",
    "load_split",
    "read_rows",
    "register_task",
    "split_path",
    "split_source",
]
