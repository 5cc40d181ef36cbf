"""MBPP (Austin et al. 2021): write a function from one sentence and its assertions."""

from __future__ import annotations

from types import MappingProxyType

from semalign.tasks.task import Example, Row, Task


class Mbpp(Task):
    name = "mbpp"
    kind = "code"
    metric = "pass@1"
    schema = MappingProxyType({"task_id": int | str, "text": str, "code": str, "test_list": list})
    stop = ("\nTask:",)
    max_tokens = 512

    def check(self, row: Row) -> str | None:
        tests = row["test_list"]
        if not tests or not all(isinstance(test, str) for test in tests):
            return "field 'test_list' must be at least one string"
        if not isinstance(row.get("test_setup_code", ""), str):
            return "field 'test_setup_code' must be str"
        return None

    def example(self, row: Row, index: int) -> Example:
        tests = "\n".join(row["test_list"])
        return Example(
            id=f"mbpp/{row['task_id']}" if isinstance(row["task_id"], int) else row["task_id"],
            task=self.name,
            prompt=f"Task: {row['text']}\nTests:\n{tests}\nCode:\n",
            answer=f"{_normalise(row['code'])}\n",
            row=row,
        )

    def program(self, output: str, row: Row) -> str:
        # The setup comes after the code: in the published file it builds objects of classes that
        # the code defines (task ids 367 and 927).
        setup = _normalise(row.get("test_setup_code", ""))
        return "\n".join([_normalise(self.cut(output)), setup, *row["test_list"], ""])


def _normalise(code: str) -> str:
    """Code with Unix line ends and no blank lines around it; the published file mixes line ends."""
    return code.replace("\r\n", "\n").strip("\n\r").rstrip()
