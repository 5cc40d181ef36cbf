"""Errors that end a run with one line instead of a traceback, and the hint that helps."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Bad input: one line with the key or file, what was expected and the nearest valid choice.

    Entry points print the message and exit with status 2; any other error is a defect of semalign.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Failed(RuntimeError):
    """A run that failed for a known reason: one line, which entry points print; exit status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Terminated(KeyboardInterrupt):
    """The process was sent SIGTERM, as clusters and `timeout` do: it ends as after Ctrl-C."""


class Diverged(Failed):
    """The loss is NaN or infinite; the message names the step and the examples."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of an error message: the valid choice closest to `name`, or all if none is close."""
    options = sorted(str(choice) for choice in choices)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"expected one of: {', '.join(options) or '(none)'}"


def one_line(text: object, *, limit: int | None = None) -> str:
    """A text, such as another library's error, on one line of at most `limit` characters."""
    line = " ".join(str(text).split())
    return line if limit is None or len(line) <= limit else f"{line[: limit - 3]}..."


def root_cause(error: BaseException) -> BaseException:
    """What a worker raised, without the errors that Ray and Ray Train put around it."""
    while (inner := _inner(error)) is not None:
        error = inner
    return error


def _inner(error: BaseException) -> BaseException | None:
    """By the attributes of Ray's errors: of tasks, of Ray Train's controller and its workers."""
    found: list[Any] = [getattr(error, name, None) for name in ("cause", "controller_failure")]

    def known(failure: BaseException) -> bool:
        return isinstance(root_cause(failure), UserError | Failed)

    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict):  # one worker's error makes others fail: first those we know
        found += sorted(failures.values(), key=lambda failure: not known(failure))
    return next((inner for inner in found if isinstance(inner, BaseException)), None)
