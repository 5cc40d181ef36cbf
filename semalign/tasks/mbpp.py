"""MBPP (Austin et al. 2021): write a function from one sentence and its assertions."""

from __future__ import annotations

import ast
from types import MappingProxyType

from semalign.sandbox.program import Program
from semalign.tasks.profile import (
    CODE_FENCE,
    COMPLETE_FUNCTION,
    TWENTY_SAMPLES,
    Profile,
    Published,
)
from semalign.tasks.task import Row, Task


class Mbpp(Task):
    name = "mbpp"
    kind = "code"
    metric = "pass@1"
    schema = MappingProxyType({"task_id": int | str, "text": str, "code": str, "test_list": list})
    template = "Task: {{ text }}\nTests:\n{{ test_list | join('\n') }}\nCode:\n"
    profiles = MappingProxyType(
        {
            "paper": Profile(prompt=template, stop=("\nTask:",), timeout_s=10.0),
            "paper-chat": Profile(
                prompt="{{ text }}\nIt must pass these tests:\n\n"
                f"{CODE_FENCE}{{{{ test_list | join('\\n') }}}}\n```",
                prefix=CODE_FENCE,
                chat="template",
                stop=("\n```",),
                timeout_s=10.0,
            ),
            "open-instruct": Profile(
                prompt=f"{COMPLETE_FUNCTION}{{{{ text }}}}\n{{{{ code.split(':')[0] }}}}",
                prefix=f"Here is the completed function:\n\n\n{CODE_FENCE}",
                chat="tulu",
                stop=("```",),
                timeout_s=10.0,
                **TWENTY_SAMPLES,
            ),
        }
    )
    # Sizes and id ranges: Austin et al. 2021, README of the data.
    published = Published(
        hub=("google-research-datasets/mbpp", "full"),
        file="mbpp",
        prefix="mbpp",
        splits={
            "prompt": range(1, 11),
            "test": range(11, 511),
            "validation": range(511, 601),
            "train": range(601, 975),
        },
    )

    def id(self, row: Row, index: int) -> str:
        number = row["task_id"]
        return f"mbpp/{number}" if isinstance(number, int) else str(number)

    def answer(self, row: Row) -> str:
        return f"{_normalise(row['code'])}\n"

    def check(self, row: Row) -> str | None:
        tests = row["test_list"]
        if not tests or not all(isinstance(test, str) for test in tests):
            return "field 'test_list' must be at least one string"
        if not isinstance(row.get("test_setup_code", ""), str):
            return "field 'test_setup_code' must be str"
        try:
            _defined(row["code"])
        except SyntaxError as error:
            return f"field 'code' is not Python ({error.msg}, line {error.lineno})"
        return None

    def program(self, output: str, row: Row) -> Program:
        # The setup comes after the code: in the published file it builds objects of classes that
        # the code defines (task ids 367 and 927).
        setup = _normalise(row.get("test_setup_code", ""))
        return Program(
            solution=f"{_normalise(output)}\n{setup}\n",
            tests="\n".join([*row["test_list"], ""]),
            entry=_defined(row["code"]),
        )


def _defined(code: str) -> tuple[str, ...]:
    """The functions and classes at the top of a module."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return tuple(node.name for node in ast.parse(_normalise(code)).body if isinstance(node, kinds))


def _normalise(code: str) -> str:
    """Code with Unix line ends and no blank lines around it; the published file mixes line ends."""
    return code.replace("\r\n", "\n").strip("\n\r").rstrip()
