"""The code in an answer: all of it, or what stands in a fence."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n?", re.MULTILINE)


def whole(answer: str) -> str:
    """The answer as it is."""
    return answer


def first_fence(answer: str) -> str:
    """The first fenced block, to its end or the answer's; without one, what stands before a fence.

    As OpenAI's simple-evals (the first block, else the whole answer) and lm_eval's
    humaneval_instruct (the code before the fence that closes the one in the prompt). A fence opens
    a block when it names a language or follows no code.
    """
    fence = _FENCE.search(answer)
    if fence is None:
        return answer
    before = answer[: fence.start()]
    if before.strip() and not fence[1] and _is_code(before):
        return before
    return answer[fence.end() :].partition("```")[0]


def _is_code(text: str) -> bool:
    """Whether it has statements, as a module or as the rest of a function."""
    for start in ("", "def f():\n    0\n"):
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            if ast.dump(ast.parse(start + text)) != ast.dump(ast.parse(start)):
                return True
    return False


# By the name that a profile of a code task has as its reader.
CODE_READERS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {"": whole, "first-fence": first_fence}
)
