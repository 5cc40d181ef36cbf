"""Reference solutions of shipped code rows pass their own tests, and other programs fail them."""

from __future__ import annotations

import pytest

from semalign import zoo
from semalign.sandbox import run as sandbox
from semalign.tasks import TASKS, load_split

SAMPLE = slice(None, None, 25)


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_reference_solutions_pass_in_the_sandbox(task: str) -> None:
    for example in load_split(zoo.path("zoo/data"), task, "test")[SAMPLE]:
        verdict = sandbox.run(TASKS[task].program(example.answer, example.row))
        assert verdict.passed, (example.id, verdict.reason)


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_returning_the_argument_solves_nothing(task: str) -> None:
    for example in load_split(zoo.path("zoo/data"), task, "test")[SAMPLE]:
        signature = (example.prompt + example.answer).split("def ")[1].splitlines()[0]
        body = f"    return {signature.split('(')[1].rstrip('):')}\n"
        output = body if task == "humaneval" else f"def {signature}\n{body}"
        assert not sandbox.run(TASKS[task].program(output, example.row)).passed, example.id
