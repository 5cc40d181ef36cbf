"""What a benchmark is: rows of a file -> prompts -> extracted answers -> verdicts. Strings only."""

from __future__ import annotations

import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal

from semalign.errors import UserError

Row = dict[str, Any]
Kind = Literal["choice", "text", "code"]
Metric = Literal["accuracy", "pass@1"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One item: ``prompt + answer`` is the supervised text, the end-of-text token follows."""

    id: str
    task: str
    prompt: str
    answer: str
    row: Row


class Task(ABC):
    """A benchmark in its zero-shot form.

    ``choice`` tasks are scored by the next-token scores of their letters, ``text`` tasks by an
    answer extracted from generated text, ``code`` tasks by running a program in the sandbox.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    metric: ClassVar[Metric]
    schema: ClassVar[Mapping[str, type | UnionType]]
    stop: ClassVar[tuple[str, ...]] = ()
    max_tokens: ClassVar[int] = 512

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields every row must have."""
        return tuple(self.schema)

    @abstractmethod
    def example(self, row: Row, index: int) -> Example:
        """The zero-shot prompt of a row and its reference answer."""

    def check(self, row: Row) -> str | None:
        """What else is wrong with a row whose fields have the right types; None when nothing is."""
        return None

    def cut(self, output: str) -> str:
        """The output up to the first stop string."""
        ends = [at for stop in self.stop if (at := output.find(stop)) >= 0]
        return output[: min(ends, default=len(output))]

    def extract(self, output: str, row: Row) -> str | None:
        """The answer in a choice or text output; None when there is none."""
        raise NotImplementedError(f"{self.name} is a {self.kind} task: use program()")

    def correct(self, extracted: str | None, row: Row) -> bool:
        """Whether an extracted answer is the row's own."""
        raise NotImplementedError(f"{self.name} is a {self.kind} task: use program()")

    def program(self, output: str, row: Row) -> str:
        """The whole program, tests included, that decides a code output."""
        raise NotImplementedError(f"{self.name} is a {self.kind} task: use extract() and correct()")


def read_rows(path: Path, task: Task) -> list[Row]:
    """Rows of a ``.jsonl`` or ``.jsonl.gz`` file, every field of every row checked.

    Raises UserError naming the file, the line and the field.
    """
    rows = [_parse(line, f"{path}:{number}", task) for number, line in _lines(path)]
    if not rows:
        raise UserError(f"{path}: no rows; expected one JSON object a line for {task.name}")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers, counted from 1."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number + 1}: not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from error


def _parse(line: str, where: str, task: Task) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for field, kind in task.schema.items():
        if field not in row:
            raise UserError(
                f"{where}: field '{field}' is missing; {task.name} needs {', '.join(task.fields)}"
            )
        if not isinstance(row[field], kind) or isinstance(row[field], bool):
            found = type(row[field]).__name__
            expected = kind.__name__ if isinstance(kind, type) else kind
            raise UserError(f"{where}: field '{field}' must be {expected}, found {found}")
    if problem := task.check(row):
        raise UserError(f"{where}: {problem}")
    return row
