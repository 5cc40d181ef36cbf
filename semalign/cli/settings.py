"""The settings of a job on the command line: what a command takes, its help, its completion."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from pydantic import BaseModel

    from semalign.config.describe import Setting

JobKind = Literal["transfer", "evaluate", "analyze"]


def schema_of(job: str) -> type[Any]:
    """What configures a kind of job; `sweep` for the keys of a sweep's file."""
    from semalign.config.jobs import AnalysisJob, Config, EvaluationJob

    if job == "sweep":
        from semalign.sweep.file import Sweep

        return Sweep
    return {"transfer": Config, "evaluate": EvaluationJob, "analyze": AnalysisJob}[job]


def split_words(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files, and the overrides."""
    files = [word for word in words if "=" not in word]
    return files, [word for word in words if "=" in word]


def complete_word(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of settings, the values of those that have a few, and YAML files."""
    from semalign.config.describe import leaf_settings

    job = ctx.command.name if ctx.command.name in ("evaluate", "analyze") else "transfer"
    settings = leaf_settings(schema_of(str(job)))
    name, equals, _ = incomplete.partition("=")
    if equals:
        values = _values(settings[name].type) if name in settings else []
        return [word for value in values if (word := f"{name}={value}").startswith(incomplete)]
    names = [f"{name}=" for name in settings if name.startswith(incomplete)]
    return names + [str(path) for path in _files(incomplete)]


def _values(type_text: str) -> list[str]:
    if type_text.startswith("true or false"):
        return ["true", "false"]
    options, _, _ = type_text.removeprefix("one of ").partition(";")
    return options.split(", ") if type_text.startswith("one of ") else []


def _files(incomplete: str) -> Iterator[Path]:
    folder = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            fits = path.is_dir() or path.suffix in (".yaml", ".yml")
            if fits and str(path).startswith(incomplete):
                yield path


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE.yaml|key=value",
        help="Configuration files and dotted settings; later ones win.",
        autocompletion=complete_word,
        show_default=False,
    ),
]


class JobCommand(TyperCommand):
    """A command whose help ends with every setting that it takes."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)
        formatter.write("\n" + "\n".join(self.settings(formatter.width)))

    def settings(self, width: int) -> Iterator[str]:
        yield "Settings, as key=value or in a YAML file (~: whether, where, how fast it runs):"
        yield from setting_lines(schema_of(str(self.name)), width)


class SweepCommand(JobCommand):
    """The same, for a sweep: the keys of its file, and the settings of its base."""

    def settings(self, width: int) -> Iterator[str]:
        yield "Keys of a sweep's file (sweep.key=value on the command line):"
        yield from setting_lines(schema_of("sweep"), width, {"base": "settings", "axes": "axes"})
        yield "\nSettings of its base, and names of its axes (key=value):"
        yield from setting_lines(schema_of("transfer"), width)


def setting_lines(
    schema: type[BaseModel], width: int, types: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Lines of text: every setting with type, default and its sentence, by section. `types` has
    words for those whose own tell little.
    """
    from semalign.config.describe import leaf_settings

    section = ""
    for setting in leaf_settings(schema).values():
        if setting.section != section:
            section = setting.section
            yield ""
        kind = (types or {}).get(setting.name, setting.type)
        mark = "~" if setting.runtime else " "
        yield f"{mark} {setting.name}  {kind}{_default(setting)}"
        for line in textwrap.wrap(setting.description, width - 6, break_on_hyphens=False):
            yield f"      {line}"


def _default(setting: Setting) -> str:
    from semalign.config.describe import yaml_text

    return "" if setting.required else f"  [default: {yaml_text(setting.default)}]"


def resolved(words: Sequence[str] | None, schema: type[Any]) -> Any:
    """The configuration of a command's words."""
    from semalign.config.read import resolve

    files, overrides = split_words(words or ())
    return resolve(files, overrides, schema)
