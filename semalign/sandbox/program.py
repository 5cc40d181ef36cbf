"""A program to be judged: the solution and the tests, kept apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Program:
    """A generated solution and the tests that decide it; they run in processes of their own.

    ``context`` is the benchmark's code that defines names for the tests; ``entry`` are the names
    that mean the solution's own even where the context or Python defines them too.
    """

    solution: str
    tests: str
    context: str = ""
    entry: tuple[str, ...] = ()
