"""Configurations from YAML files and dotted overrides; every error is one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from semalign.config.describe import inner_section, leaf_settings
from semalign.config.dotted import expand, flat, merge, nested
from semalign.config.jobs import AnalysisJob, Config, EvaluationJob
from semalign.errors import UserError, nearest

Schema = TypeVar("Schema", Config, EvaluationJob, AnalysisJob)

COMMAND_LINE = "command line"
_DEFAULT = "default"
# What MLflow itself reads them as; any setting that is given wins.
ENVIRONMENT = {
    "tracking.uri": "MLFLOW_TRACKING_URI",
    "tracking.experiment": "MLFLOW_EXPERIMENT_NAME",
}
_SHOWN = 8  # files that an error lists
_TYPO = 0.75  # likeness of two names that differ by a slip


def resolve(
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    schema: type[Schema] = Config,  # type: ignore[assignment]
) -> Schema:
    """Defaults <- environment <- YAML files <- dotted `key=value` overrides; folders by their
    absolute paths.

    Raises UserError naming the key or file and the nearest valid choice.
    """
    return resolve_with_sources(files, overrides, schema)[0]


def resolve_with_sources(
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    schema: type[Schema] = Config,  # type: ignore[assignment]
) -> tuple[Schema, dict[str, str]]:
    """The configuration, and where each of its settings came from, by dotted name: `default`, the
    path of a file, `command line`, or `environment` and the name of the variable.

    Raises UserError naming the key or file and the nearest valid choice.
    """
    layers = [
        (f"environment {ENVIRONMENT[name]}", nested({name: value}))
        for name, value in environment_settings().items()
    ]
    layers += [(str(file), expand(read_yaml(Path(file)))) for file in files]
    layers += [(COMMAND_LINE, expand(parse_override(text))) for text in overrides]
    tree: dict[str, Any] = {}
    for _, layer in layers:
        merge(tree, layer)
    config = validate(tree, schema)
    names = flat(config.model_dump())
    return config, {name: _source(name, layers) for name in names}


def _source(name: str, layers: list[tuple[str, dict[str, Any]]]) -> str:
    """The last layer that has the setting, or its section as a whole."""
    for source, layer in reversed(layers):
        node: Any = layer
        for part in name.split("."):
            node = node.get(part, _DEFAULT) if isinstance(node, Mapping) else node
        if node is not _DEFAULT:
            return source
    return _DEFAULT


def environment_settings() -> dict[str, str]:
    """The settings that environment variables give, by dotted name."""
    return {name: os.environ[v] for name, v in ENVIRONMENT.items() if os.environ.get(v)}


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=v` -> {"a": {"b": v}}, v read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}': expected key=value, e.g. loss.alpha=0.3")
    try:
        node: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: '{value}' is not a YAML value ({error})") from None
    for part in reversed(key.split(".")):
        node = {part: node}
    return node


def validate(
    tree: Mapping[str, Any],
    schema: type[Schema] = Config,  # type: ignore[assignment]
) -> Schema:
    """A configuration from a nested mapping; the first problem becomes one UserError."""
    for name in _unknown(schema, tree):
        raise UserError(f"{name}: unknown key; {_suggestion(schema, name)}")
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if not key:  # of settings that do not go together
            raise UserError(message) from None
        given = problem["input"]
        context = problem.get("ctx") or {}
        if problem["type"] == "literal_error":
            choices = [c.strip(" '") for c in context["expected"].replace(" or ", ", ").split(",")]
            message = nearest(str(given), choices)
        raise UserError(f"{key}={given!r}: {message}") from None


def _unknown(model: type[BaseModel], tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings that there are not."""
    if not isinstance(tree, Mapping):
        where = prefix.removesuffix(".") or "configuration"
        raise UserError(f"{where}={tree!r}: expected a mapping of keys")
    for key, value in tree.items():
        field = model.model_fields.get(str(key))
        if field is None:
            yield from flat({str(key): value}, prefix) or [f"{prefix}{key}"]
        elif (inner := inner_section(field)) is not None and value is not None:
            yield from _unknown(inner, value, f"{prefix}{key}.")


def _suggestion(schema: type[BaseModel], name: str) -> str:
    """The nearest setting by its dotted name: a similar one of the same section, then one of
    another section whose last part is the same or similar; all of the section if none is close.
    """
    section, _, last = name.rpartition(".")
    known, inside = "", _children(schema)
    for part in name.split("."):
        if (inner := inside.get(part)) is None:
            break
        known, inside = f"{known}{part}.", _children(inner)
    in_section = known.removesuffix(".") == section
    if in_section and (close := difflib.get_close_matches(last, inside, n=1, cutoff=_TYPO)):
        return f"did you mean '{known}{close[0]}'?"
    namesakes: dict[str, list[str]] = {}
    for other in leaf_settings(schema):
        namesakes.setdefault(other.rpartition(".")[2], []).append(other)
    if close := difflib.get_close_matches(last, namesakes, n=1, cutoff=_TYPO):
        return _namesakes(section, namesakes[close[0]])
    wrong = name.removeprefix(known).partition(".")[0]
    if close := difflib.get_close_matches(wrong, inside, n=1):
        return f"did you mean '{known}{close[0]}'?"
    return f"expected one of: {', '.join(sorted(known + child for child in inside))}"


def _namesakes(section: str, names: list[str]) -> str:
    """The setting of the section that the given one was meant for; of the first section, and all
    others too, if it is like none.
    """
    sections = {name.rpartition(".")[0]: name for name in names}
    if close := difflib.get_close_matches(section, sections, n=1):
        return f"did you mean '{sections[close[0]]}'?"
    first, *others = names
    return f"did you mean '{first}'?" + (f" There is also {', '.join(others)}." if others else "")


def _children(model: type[BaseModel]) -> dict[str, Any]:
    """The names of a section's fields; of those that are sections, their models."""
    return {name: inner_section(field) for name, field in model.model_fields.items()}


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError; of a file that does not exist, with the nearest
    one that does.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: does not exist; {_near_files(file)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text in UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML ({error})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{file}: expected a mapping of keys at the top level")
    return tree


def _near_files(file: Path) -> str:
    """The nearest YAML file of its folder or, where that does not exist, of the one above."""
    folder = file.parent if file.parent.is_dir() else file.parent.parent
    found = [*_yaml_files(folder, "*"), *_yaml_files(folder, "*/*")]
    names = {str(path.relative_to(folder)): path for path in found}
    wanted = str(file.relative_to(folder))
    if close := difflib.get_close_matches(wanted, names, n=1):
        return f"did you mean '{names[close[0]]}'?"
    if namesakes := [path for path in found if path.stem == file.stem]:
        return f"did you mean '{namesakes[0]}'?"
    here = [path.name for path in _yaml_files(folder, "*")]
    listed = ", ".join(here[:_SHOWN]) + (", ..." if len(here) > _SHOWN else "")
    return f"expected a YAML file or key=value; YAML files in {folder}: {listed or '(none)'}"


def _yaml_files(folder: Path, pattern: str) -> list[Path]:
    suffixes = (".yaml", ".yml")
    try:
        return sorted(path for path in folder.glob(pattern) if path.suffix in suffixes)
    except OSError:
        return []
