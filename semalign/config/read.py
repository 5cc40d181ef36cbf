"""Configurations from YAML files and dotted overrides; every error is one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from semalign.config.jobs import AnalysisJob, Config, EvaluationJob
from semalign.errors import UserError, nearest

Schema = TypeVar("Schema", Config, EvaluationJob, AnalysisJob)


def resolve(
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    schema: type[Schema] = Config,  # type: ignore[assignment]
) -> Schema:
    """Defaults <- YAML files <- dotted `key=value` overrides; folders by their absolute paths.

    Raises UserError naming the key or file and the nearest valid choice.
    """
    tree: dict[str, Any] = {}
    for file in files:
        _merge(tree, _read_yaml(Path(file)))
    for override in overrides:
        _merge(tree, parse_override(override))
    config = validate(tree, schema)
    return config.model_copy(update={"workdir": str(Path(config.workdir).expanduser().resolve())})


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
    _refuse_unknown(schema, tree, ())
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


def _refuse_unknown(model: type[BaseModel], tree: Any, path: tuple[str, ...]) -> None:
    if not isinstance(tree, Mapping):
        raise UserError(f"{'.'.join(path) or 'configuration'}={tree!r}: expected a mapping of keys")
    for key, value in tree.items():
        field = model.model_fields.get(str(key))
        where = ".".join((*path, str(key)))
        if field is None:
            raise UserError(f"{where}: unknown key; {nearest(str(key), model.model_fields)}")
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and value is not None:
                _refuse_unknown(kind, value, (*path, str(key)))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
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


def _merge(base: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value
