"""Tasks as YAML files: templates over the columns of a row, splits, a metric (docs/tasks.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from jinja2 import TemplateError
from pydantic import Field

from semalign.config.read import read_yaml, validate
from semalign.config.sections import Settings
from semalign.errors import UserError, nearest
from semalign.sandbox.program import Program
from semalign.tasks.gsm8k import ends_in_a_number, final_number
from semalign.tasks.lm_eval_task import LmEvalTask, is_lm_eval_file
from semalign.tasks.profile import FileProfile
from semalign.tasks.registry import BUILT_IN, register_task
from semalign.tasks.task import AnswerReader, Row, Task, evaluate_expression, parse_template, render

FileMetric = Literal["exact_match", "contained", "numeric", "choices", "code", "perplexity", "chrf"]
Format = Literal["templates", "messages", "completion", "text"]

_HUB = "hub:"
_KINDS: dict[str, tuple[str, str]] = {  # metric -> kind of task, and the metric of its scores
    "choices": ("choice", "accuracy"),
    "code": ("code", "pass@1"),
    "perplexity": ("likelihood", "perplexity"),
    "chrf": ("text", "chrf"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class ProgramTemplates(Settings):
    """The program that decides a code answer, as templates over the row and `output`."""

    solution: str = "{{ output }}"
    """The generated solution."""
    tests: str
    """What is run after it; it passes when nothing is raised."""
    entry: tuple[str, ...] = ()
    """Names that mean the solution's own."""


class TaskFile(Settings):
    """A task as a YAML file. Templates are Jinja over the columns of a row."""

    description: str = ""
    """One line, for `semalign ls tasks`."""
    splits: dict[str, str] = Field(default_factory=dict)
    """File of each split (JSONL or Parquet, next to the task file), or
    `hub:<data set>:<configuration>:<split>`; without it `<data.root>/<task>/<split>.jsonl`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names in the templates for columns of the files, as `name: column`."""
    format: Format = "templates"
    """What a row is: `templates`; `messages`, a chat whose last turn is the answer; `completion`,
    columns prompt and completion; `text`, a corpus without labels."""
    prompt: str = ""
    """Template of the prompt."""
    answer: str = ""
    """Template of the reference answer as it follows the prompt, leading space included."""
    choices: tuple[str, ...] | str = ()
    """Templates of the choices; or an expression for a list of them, each put after a space."""
    metric: FileMetric = "exact_match"
    """How answers are scored."""
    pattern: str = ""
    """Regular expression of the answer in generated text: its first group, of the last match."""
    ignore_case: bool = False
    """Compare without regard to case."""
    per_byte: bool = False
    """Divide the log-probability of a choice by its length in bytes."""
    program: ProgramTemplates | None = None
    prefix: str = ""
    """Template of the forced start of a generated answer."""
    chat: Literal["none", "tulu", "template"] = "none"
    """Turn that the prompt is put into: none, Tulu's, or by the tokenizer's chat template."""
    stop: tuple[str, ...] = ()
    """Strings that end a generated answer."""
    max_tokens: Annotated[int, Field(ge=1)] = 512
    """Longest generated answer."""
    timeout_s: Annotated[float, Field(gt=0)] = 3.0
    """Seconds that a program may take."""
    memory_mb: Annotated[int, Field(ge=16)] = 512
    """Memory that a program may take."""
    protocols: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What differs under a protocol, by its name: prompt, prefix, chat, stop, max_tokens."""
    id: str = ""
    """Template of a row's id; without it `<task>/<number>`."""
    group: str = ""
    """Template of a row's group, for scores by group."""
    epochs: Annotated[int, Field(ge=1)] = 5
    """Passes of a training, unless `training.epochs` is given."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Learning rate of a training, unless `training.lr` is given."""


_BY_PROTOCOL = ("prompt", "prefix", "chat", "stop", "max_tokens")
_JUDGING = ("format", "columns", "answer", "choices", "metric", "pattern", "ignore_case",
            "per_byte", "program")  # fmt: skip


class FileTask(Task):
    """A task that a YAML file describes."""

    def __init__(self, name: str, file: TaskFile, folder: Path) -> None:
        self.name, self.file = name, file
        self.kind, self.metric = _KINDS.get(file.metric, ("text", "accuracy"))  # type: ignore[assignment]
        self.description = file.description or f"task file {folder / name}"
        self.epochs, self.lr = file.epochs, file.lr
        self.labelled = file.format != "text"
        self.schema = {}
        self.template, self.definition = file.prompt, _definition(file)
        self.files = {split: _place(where, folder) for split, where in file.splits.items()}
        self.readers = {file.metric: _reader(self)}
        self.profile = _profile(file, {})
        self.profiles = {name: _profile(file, given) for name, given in file.protocols.items()}

    def id(self, row: Row, index: int) -> str:
        return self._render(self.file.id, row) if self.file.id else super().id(row, index)

    def prompt(self, row: Row) -> str:
        file = self.file
        if file.format == "messages":
            turns = self.messages(row)[:-1]
            return "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns)
        return self._render(file.prompt, row)

    def answer(self, row: Row) -> str:
        file = self.file
        if file.format == "messages":
            return str(self.messages(row)[-1]["content"])
        answer = self._render(file.answer, row)
        if file.metric != "choices":
            return answer
        choices = self.continuations(row)
        stripped = [choice.strip() for choice in choices]
        if answer.strip() not in stripped:
            hint = nearest(answer.strip(), stripped)
            raise UserError(f"answer: '{answer.strip()}' is none of the choices; {hint}")
        return choices[stripped.index(answer.strip())]

    def messages(self, row: Row) -> list[dict[str, str]]:
        if self.file.format != "messages":
            return []
        turns = self.values(row).get("messages")
        if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
            raise UserError("column 'messages' must be a list of {role, content}, both text")
        if not turns or turns[-1]["role"] != "assistant" or len(turns) < 2:
            raise UserError("column 'messages' must end in a turn of the assistant, after another")
        return turns

    def continuations(self, row: Row) -> tuple[str, ...]:
        choices = self.file.choices
        if self.file.metric == "perplexity":
            return (self.answer(row),)
        if not isinstance(choices, str):
            return tuple(self._render(choice, row) for choice in choices)
        found = self._guarded(lambda: evaluate_expression(choices, self.values(row)), row)
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise UserError(f"choices: '{choices}' must be a list of texts, found {found!r}")
        return tuple(item if item[:1].isspace() else f" {item}" for item in found)

    def best(self, scores: Sequence[float], choices: Sequence[str]) -> int:
        if self.file.per_byte:
            pairs = zip(scores, choices, strict=True)
            scores = [score / len(choice.strip().encode()) for score, choice in pairs]
        return super().best(scores, choices)

    def group(self, row: Row) -> str | None:
        return self._render(self.file.group, row) if self.file.group else None

    def program(self, output: str, row: Row) -> Program:
        templates = self.file.program
        assert templates is not None, "checked when the file was read"
        values = {**self.values(row), "output": output}
        return Program(
            solution=render(templates.solution, values),
            tests=render(templates.tests, values),
            entry=tuple(render(name, values) for name in templates.entry),
        )

    def check(self, row: Row) -> str | None:
        try:
            example = self.example(row, 0)
            self.group(row)
            if self.file.program is not None:
                self._guarded(lambda: self.program(example.answer, row), row)
        except UserError as error:
            return str(error)
        if self.file.metric != "code" and not example.answer.strip():
            return "answer: empty; expected some text"
        if self.file.metric == "numeric" and not ends_in_a_number(example.answer):
            found = example.answer.strip()[-60:]
            return (
                "answer: metric=numeric compares one number at its end, such as 5, -5, 1,200 or "
                f"$0.50, found {found!r}"
            )
        return None

    def values(self, row: Row) -> dict[str, Any]:
        """The columns of a row, under the names that the templates use too."""
        for name, column in self.file.columns.items():
            if column not in row:
                raise UserError(f"columns.{name}: no column '{column}'; {nearest(column, row)}")
        return {**row, **{name: row[column] for name, column in self.file.columns.items()}}

    def _render(self, template: str, row: Row) -> str:
        return self._guarded(lambda: render(template, self.values(row)), row)

    def _guarded(self, call: Callable[[], Any], row: Row) -> Any:
        try:
            return call()
        except TemplateError as error:
            raise UserError(f"{error.message}; the row has: {', '.join(row)}") from None
        except (TypeError, LookupError, ValueError, ArithmeticError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"a template fails ({error}); the row has: {', '.join(row)}") from None


def register_task_file(path: Path) -> None:
    """Add the task of a YAML file under the file's name without its suffix.

    Raises UserError for a file that describes no task, and for the name of a built-in one.
    """
    register_task(read_task_file(path))


def read_task_file(path: Path) -> Task:
    """The task that a YAML file describes, in lm_eval's form too; UserError with the file, the key
    and what it expects.
    """
    name = path.stem
    if not _NAME.fullmatch(name):
        raise UserError(f"{path}: expected a name of letters, digits, '_', '-' and '.'")
    if name in BUILT_IN:
        raise UserError(f"{path}: '{name}' is a built-in task; give the file another name")
    if path.is_file() and is_lm_eval_file(path.read_text(encoding="utf-8", errors="replace")):
        return LmEvalTask(name, path)
    tree = read_yaml(path)
    try:
        file: TaskFile = validate(tree, TaskFile)  # type: ignore[type-var]
        if file.format == "completion":
            defaults = {"prompt": "{{ prompt }}", "answer": "{{ completion }}"}
            file = file.model_copy(update={k: getattr(file, k) or v for k, v in defaults.items()})
        if file.format == "text":
            given = file.metric if "metric" in file.model_fields_set else "perplexity"
            answer = file.answer or "{{ text }}"
            file = file.model_copy(update={"metric": given, "answer": answer})
        if file.format == "messages":
            file = file.model_copy(update={"chat": "template"})
        _check(file)
        return FileTask(name, file, path.parent.resolve())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check(file: TaskFile) -> None:
    """Raise UserError for keys that do not go together, and for what does not compile."""
    if file.format in ("text", "messages") and file.prompt:
        raise UserError(f"prompt: a row of format={file.format} has none; leave it out")
    if file.format == "messages" and file.answer:
        raise UserError("answer: of format=messages it is the last turn; leave it out")
    if file.format == "text" and file.metric != "perplexity":
        raise UserError(f"metric={file.metric}: a corpus has no answers; expected perplexity")
    if file.format == "templates" and not file.answer:
        raise UserError("answer: missing; expected a template, or format: messages, text, ...")
    for key, metric in (("choices", "choices"), ("program", "code")):
        if bool(getattr(file, key)) != (file.metric == metric):
            wanted = "expected" if file.metric == metric else "leave it out"
            raise UserError(f"{key}: {wanted} with metric={file.metric}")
    for key, metrics in (("pattern", ("exact_match", "contained", "numeric", "chrf")),
                         ("ignore_case", ("exact_match", "contained")),
                         ("per_byte", ("choices",))):  # fmt: skip
        if getattr(file, key) and file.metric not in metrics:
            raise UserError(f"{key}: has no effect with metric={file.metric}; leave it out")
    try:
        re.compile(file.pattern)
    except re.error as error:
        raise UserError(f"pattern: not a regular expression ({error})") from None
    for protocol, given in file.protocols.items():
        for key in given:
            if key not in _BY_PROTOCOL:
                raise UserError(f"protocols.{protocol}.{key}: {nearest(key, _BY_PROTOCOL)}")
    for key, template in _templates(file):
        try:
            parse_template(template)
        except TemplateError as error:
            raise UserError(f"{key}: not a Jinja template ({error.message})") from None


def _templates(file: TaskFile) -> list[tuple[str, str]]:
    choices = file.choices
    found = [(key, getattr(file, key)) for key in ("prompt", "answer", "prefix", "id", "group")]
    found += [("choices", f"{{{{ {choices} }}}}" if isinstance(choices, str) else "")]
    found += [("choices", choice) for choice in choices if not isinstance(choices, str)]
    if file.program is not None:
        found += [
            ("program.solution", file.program.solution),
            ("program.tests", file.program.tests),
        ]
    return found + [
        (f"protocols.{name}.{key}", given[key])
        for name, given in file.protocols.items()
        for key in ("prompt", "prefix")
        if key in given
    ]


def _profile(file: TaskFile, given: Mapping[str, Any]) -> FileProfile:
    """How the file's task is prompted and decoded, where `given` replaces what the file has."""
    dumped = file.model_dump(mode="json")
    settings = validate({**dumped, **given}, TaskFile) if given else file  # type: ignore[type-var]
    return FileProfile(
        prompt=settings.prompt,
        prefix=settings.prefix,
        chat=settings.chat,
        stop=settings.stop,
        max_tokens=settings.max_tokens,
        reader="" if file.metric == "code" else file.metric,
        timeout_s=settings.timeout_s,
        memory_mb=settings.memory_mb,
        definition=_definition(file),
    )


def _definition(file: TaskFile) -> str:
    dumped = file.model_dump(mode="json")
    return json.dumps({key: dumped[key] for key in _JUDGING}, sort_keys=True)


def _reader(task: FileTask) -> AnswerReader:
    """How generated text is read and judged; of a metric without generated text it is not used."""
    file = task.file

    def extract(output: str) -> str | None:
        found = [output]
        if file.pattern:
            found = [match[match.re.groups and 1] for match in re.finditer(file.pattern, output)]
        if not found:
            return None
        text = " ".join(found[-1].split())
        return final_number(text) if file.metric == "numeric" else text

    def reference(row: Row) -> str:
        return _plain(task.answer(row), file.ignore_case)

    def correct(extracted: str | None, row: Row) -> bool:
        if extracted is None:
            return False
        if file.metric == "numeric":
            return Decimal(extracted) == Decimal(str(final_number(task.answer(row))))
        found = _plain(extracted, file.ignore_case)
        return reference(row) in found if file.metric == "contained" else found == reference(row)

    def grade(extracted: str | None, row: Row) -> float:
        from sacrebleu.metrics import CHRF

        return float(CHRF().sentence_score(extracted or "", [task.answer(row).strip()]).score) / 100

    return AnswerReader(extract, correct, grade if file.metric == "chrf" else None)


def _plain(text: str, ignore_case: bool) -> str:
    joined = " ".join(text.split())
    return joined.casefold() if ignore_case else joined


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(
        isinstance(turn.get(key), str) for key in ("role", "content")
    )


def _place(where: str, folder: Path) -> str:
    return where if where.startswith(_HUB) else str((folder / Path(where).expanduser()).resolve())
