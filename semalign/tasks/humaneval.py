"""HumanEval (Chen et al. 2021): complete a function from its signature and docstring."""

from __future__ import annotations

import keyword
from types import MappingProxyType

from semalign.tasks.task import Example, Row, Task


class HumanEval(Task):
    name = "humaneval"
    kind = "code"
    metric = "pass@1"
    schema = MappingProxyType(
        {
            "task_id": str,
            "prompt": str,
            "entry_point": str,
            "canonical_solution": str,
            "test": str,
        }
    )
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # those of Chen et al. 2021, section 2.1
    max_tokens = 512

    def check(self, row: Row) -> str | None:
        name = row["entry_point"]
        if name.isidentifier() and not keyword.iskeyword(name):
            return None
        return f"field 'entry_point' must be a Python identifier, found {name!r}"

    def example(self, row: Row, index: int) -> Example:
        return Example(
            id=row["task_id"],
            task=self.name,
            prompt=row["prompt"],
            answer=row["canonical_solution"],
            row=row,
        )

    def program(self, output: str, row: Row) -> str:
        check = f"check({row['entry_point']})"
        return f"{row['prompt']}{self.cut(output)}\n{row['test']}\n{check}\n"
