"""The code in an answer, as models write it: plain, in fences, with prose around it."""

from __future__ import annotations

import pytest

from semalign.tasks.extraction import CODE_READERS, first_fence

CODE = "def f(x):\n    return x\n"
BODY = "\n    return x\n"
AGAIN = "```python\ndef g():\n    pass\n```\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (CODE, CODE),
        (BODY, BODY),
        ("", ""),
        (f"```python\n{CODE}```\n", CODE),
        (f"\n```python\n{CODE}```\nIt returns x.\n", CODE),
        (f"```\n{CODE}```", CODE),
        (f"``` py\n{CODE}```", CODE),
        (f"```python\n{CODE}", CODE),  # cut before its end
        (f"Here is the function:\n\n```python\n{CODE}```\n", CODE),
        (f"Here is the function:\n\n```\n{CODE}```\n", CODE),
        (f"  ```python\n{CODE}  ```\n", f"{CODE}  "),
        (f"{CODE}```\n\nIt returns x.\n", CODE),  # closes the prompt's own fence
        (f"{BODY}```\n\nIt returns x.\n{AGAIN}", BODY),
        (f"# Solution\n```\n{CODE}```", CODE),  # a comment is no code
        (f"```python\n{CODE}```\nor\n{AGAIN}", CODE),  # the first one
        ("```", ""),
        ("I cannot.\n```python\n```", ""),
    ],
)
def test_first_fence(answer: str, code: str) -> None:
    assert first_fence(answer) == code
    assert CODE_READERS["first-fence"](answer) == code
    assert CODE_READERS[""](answer) == answer
