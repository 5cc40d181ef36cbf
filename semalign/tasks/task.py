"""What a task is: rows of a file -> prompts -> extracted answers -> verdicts. Strings only."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, NamedTuple

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

from semalign.errors import UserError
from semalign.sandbox.program import Program
from semalign.tasks.profile import LibraryTask, Profile, Published

Row = dict[str, Any]
TaskKind = Literal["choice", "text", "code", "likelihood", "lm_eval"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One item: ``prompt + answer`` is the supervised text, the end-of-text token follows."""

    id: str
    task: str
    prompt: str
    answer: str
    row: Row


class AnswerReader(NamedTuple):
    """How the answer in a text is found and judged.

    ``extract`` returns the answer, or None where there is none; ``correct`` compares it with the
    answer of the row; ``grade``, of a metric that is not right or wrong, scores it from 0 to 1.
    """

    extract: Callable[[str], str | None]
    correct: Callable[[str | None, Row], bool]
    grade: Callable[[str | None, Row], float] | None = None


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What is requested of a model for one row: the log-probabilities of `scored`, as (context,
    text), or the text that follows the prompt.
    """

    prompt: str
    scored: tuple[tuple[str, str], ...] = ()
    stop: tuple[str, ...] = ()
    max_tokens: int = 1


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a task of lm_eval finds in one output; `metrics` is each metric's value, as JSON."""

    extracted: str | None
    correct: bool
    score: float | None
    metrics: str


class Task(ABC):
    """A task: what its rows are, how a row is trained on, and how its answers are evaluated.

    ``choice`` tasks are scored by the log-probabilities of their choices, ``text`` tasks by an
    answer found in generated text, ``code`` tasks by running a program in the sandbox,
    ``likelihood`` tasks by the log-probability of the answer itself, and ``lm_eval`` tasks by
    lm_eval. A task is one file, and `register_task` adds it. How it is evaluated depends on the
    protocol, so it has a profile for each of those it knows, or one for all.
    """

    name: str
    kind: TaskKind
    metric: str
    schema: Mapping[str, type | UnionType]
    template: str  # the zero-shot prompt, in Jinja over the fields of a row
    readers: Mapping[str, AnswerReader] = MappingProxyType({})  # of a text task, by name
    profiles: Mapping[str, Profile] = MappingProxyType({})  # by protocol
    profile: Profile | None = None  # under protocols that `profiles` has none for
    published: Published | None = None
    library: LibraryTask | None = None  # of lm_eval
    files: Mapping[str, str] = MappingProxyType({})  # of a task that names the files of its splits
    definition: str = ""  # of a task file, all of it that judges answers
    labelled: bool = True  # whether rows have answers, or are text that a model predicts
    epochs: int = 5  # of a training on it, unless given: Table 5
    lr: float = 3e-4

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields every row must have."""
        return tuple(self.schema)

    def id(self, row: Row, index: int) -> str:
        """A name that no other row of the split has: by default the task's and the row's place."""
        return f"{self.name}/{index}"

    def prompt(self, row: Row) -> str:
        """The zero-shot prompt."""
        return render(self.template, row)

    @abstractmethod
    def answer(self, row: Row) -> str:
        """The reference answer as it follows the zero-shot prompt."""

    def example(self, row: Row, index: int) -> Example:
        """The row as a zero-shot prompt and its reference answer, on which models are trained."""
        return Example(
            id=self.id(row, index),
            task=self.name,
            prompt=self.prompt(row),
            answer=self.answer(row),
            row=row,
        )

    def messages(self, row: Row) -> list[dict[str, str]]:
        """The turns of a row that is a chat, the answer last; else none."""
        return []

    def continuations(self, row: Row) -> tuple[str, ...]:
        """The texts whose log-probability after the prompt decides; none where the profile has
        the choices, or text is generated.
        """
        return ()

    def load(self, root: Path, split: str) -> list[Example] | None:
        """The examples of a split, of a task that reads its rows itself; else None."""
        return None

    def source(self, root: Path, split: str) -> str:
        """Where a task that reads its rows itself has those of a split."""
        raise NotImplementedError

    def request(self, row: Row) -> TextRequest | None:
        """What is requested of a model, of a task without profiles."""
        return None

    def verdicts(self, rows: Sequence[Row], outputs: Sequence[Any]) -> list[Verdict]:
        """What a task that judges by itself finds in the outputs of rows."""
        raise NotImplementedError

    def totals(self, metrics: Sequence[str]) -> dict[str, float]:
        """The metrics over all items, from each item's own, of a task that judges by itself."""
        return {}

    def values(self, row: Row) -> Row:
        """What the templates are over: the fields of a row."""
        return row

    def best(self, scores: Sequence[float], choices: Sequence[str]) -> int:
        """The choice that the log-probabilities stand for; of equal ones, the first."""
        return max(range(len(scores)), key=scores.__getitem__)

    def check(self, row: Row) -> str | None:
        """The error in a row whose fields have the right types, or None when there is none."""
        return None

    def group(self, row: Row) -> str | None:
        """The group of the row, such as its subject, for scores by group; None without groups."""
        return None

    def program(self, output: str, row: Row) -> Program:
        """The solution in a code output, and the row's tests."""
        raise NotImplementedError(f"{self.name} is a {self.kind} task: use its readers")


_TEMPLATES = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def render(template: str, row: Row) -> str:
    """A Jinja template over the fields of a row."""
    return _compiled(template).render(row)


def parse_template(template: str) -> None:
    """Raise Jinja's TemplateError for a text that is no template."""
    _TEMPLATES.parse(template)


def evaluate_expression(expression: str, row: Row) -> Any:
    """The value of a Jinja expression over the fields of a row."""
    return _TEMPLATES.compile_expression(expression, undefined_to_none=False)(row)


@functools.cache
def _compiled(template: str) -> Template:
    return _TEMPLATES.from_string(template)


def cut(output: str, stop: Sequence[str]) -> str:
    """The output up to the first of the stop strings."""
    ends = [at for text in stop if (at := output.find(text)) >= 0]
    return output[: min(ends, default=len(output))]


def read_rows(path: Path, task: Task) -> list[Row]:
    """Rows of a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, every field of every row checked.

    Raises UserError naming the file, the line and the field of the first wrong row, and how many
    there are.
    """
    rows: list[Row] = []
    faults: list[str] = []
    for number, line in read_lines(path):
        try:
            rows.append(parse_row(line, f"{path}:{number}", task))
        except UserError as error:
            faults.append(str(error))
    if faults:
        more = f" ({len(faults)} such rows)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}")
    if not rows:
        raise UserError(f"{path}: no rows; expected one JSON object a line for {task.name}")
    return rows


def to_json(row: Row) -> str:
    """A row of a data set as a JSON line; dates and what else JSON lacks as text."""
    return json.dumps(row, default=lambda value: getattr(value, "tolist", lambda: str(value))())


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers, counted from 1; of a Parquet file its rows as JSON."""
    number = 0
    if path.suffix == ".parquet":
        yield from enumerate(map(to_json, _parquet(path)), start=1)
        return
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


def _parquet(path: Path) -> list[Row]:
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read as Parquet ({reason})") from error
    return rows


def parse_row(line: str, where: str, task: Task) -> Row:
    """The row of a JSON line, with every field checked.

    Raises UserError that begins with ``where`` and names the field.
    """
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
