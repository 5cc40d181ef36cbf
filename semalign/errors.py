"""Errors that end a run with one line instead of a traceback, and the hint that helps."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one line with the key or file, what was expected and the nearest valid choice.

    Entry points print the message and exit with status 2; any other error is a defect of semalign.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class Failed(RuntimeError):
    """A run that failed for a known reason: one line, which entry points print; exit status 1."""


class Diverged(Failed):
    """The loss is NaN or infinite; the message names the step and the examples."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of an error message: the valid choice closest to `name`, or all if none is close."""
    options = sorted(str(choice) for choice in choices)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"expected one of: {', '.join(options) or '(none)'}"
