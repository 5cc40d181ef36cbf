"""The code in an answer: all of it, or what stands in a fence."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

_FENCE = re.compile(r"^[ \t]*```[^\n]*\n?", re.MULTILINE)
# How a line of Python begins that is no line of prose.
_STATEMENT = re.compile(
    r"^[ \t]*(?:"
    r"(?:async )?def \w+\s*\(|class \w+\s*[:(]|@\w|import \w|from [\w.]+ import|"
    r"(?:for|while|if|with|try)\b.*:[ \t]*(?:#.*)?$|(?:return|yield|raise|assert|pass)\b|"
    r"\w[\w.,\[\] \t]*?[ \t]*[-+*/]?=[^=]|\w[\w.]*\(.*\)[ \t]*$)",
    re.MULTILINE,
)


def whole(answer: str) -> str:
    """The answer as it is."""
    return answer


def first_fence(answer: str) -> str:
    """The first part of the answer, before, in or after a fence, that has code; all of it without a
    fence, and nothing where no part has code.

    So the first fenced block, as in OpenAI's simple-evals, with prose around it or not, or what
    stands before the fence that closes the prompt's own, as in lm_eval's humaneval_instruct.
    """
    parts = _FENCE.split(answer)
    if len(parts) == 1:
        return answer
    return next((part.partition("```")[0] for part in parts if has_code(part)), "")


def has_code(text: str) -> bool:
    """Whether a line begins as a statement of Python."""
    return _STATEMENT.search(text) is not None


# By the name that a profile of a code task has as its reader.
CODE_READERS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {"": whole, "first-fence": first_fence}
)
