"""The four benchmarks, and reading a named split of one of them."""

from semalign.tasks.registry import TASKS, find_task
from semalign.tasks.splits import HUB, load_split, split_path, split_source
from semalign.tasks.task import Example, Row, Task, read_rows

__all__ = [
    "HUB",
    "TASKS",
    "Example",
    "Row",
    "Task",
    "find_task",
    "load_split",
    "read_rows",
    "split_path",
    "split_source",
]
