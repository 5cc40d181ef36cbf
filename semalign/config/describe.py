"""What settings there are: name, type, default and description, read off the sections."""

from __future__ import annotations

import functools
import math
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from semalign.config.sections import Runtime

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Any: "any value",
    type(None): "null",
}
_PLAIN = re.compile(r"[A-Za-z][A-Za-z_/\-]*")
_READ_OTHERWISE = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}  # by YAML
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting by its dotted name. `type` is for people; `runtime`: it decides whether, where and
    how fast a run goes, and nothing of what comes out.
    """

    name: str
    type: str
    default: Any
    description: str
    runtime: bool
    required: bool = False

    @property
    def section(self) -> str:
        """The dotted name of its section; empty for a setting of the job itself. A section that may
        be null is its own.
        """
        return self.name if self.type.startswith("section") else self.name.rpartition(".")[0]


def leaf_settings(schema: type[BaseModel]) -> dict[str, Setting]:
    """Every setting by its dotted name, in the order of the sections.

    A section that may be null, such as `evaluation.sampling`, is a setting too, of default None;
    its parts follow, with the defaults that they have where the section is given.
    """
    return {setting.name: setting for setting in _settings(schema)}


@functools.cache
def _settings(schema: type[BaseModel]) -> tuple[Setting, ...]:
    return tuple(_leaves(schema, "", runtime=False))


def _leaves(schema: type[BaseModel], prefix: str, *, runtime: bool) -> Iterator[Setting]:
    for name, field in sorted(schema.model_fields.items(), key=lambda item: _place(item[1])):
        inner = inner_section(field)
        marked = runtime or _is_runtime(field)
        if inner is None or inner is not field.annotation:
            yield Setting(
                name=prefix + name,
                type=_type_text(field.annotation, field.metadata),
                default=None if field.is_required() else field.get_default(),
                description=" ".join((field.description or "").split()),
                runtime=marked,
                required=field.is_required(),
            )
        if inner is not None:
            yield from _leaves(inner, f"{prefix}{name}.", runtime=marked)


def _place(field: FieldInfo) -> int:
    """Leaves come first, then the sections, then those that are runtime as a whole."""
    return 0 if inner_section(field) is None else 1 + _is_runtime(field)


def _is_runtime(field: FieldInfo) -> bool:
    return any(isinstance(part, Runtime) for part in field.metadata)


def inner_section(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, or None for a leaf."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


@functools.cache
def runtime_settings(schema: type[BaseModel]) -> frozenset[str]:
    """Dotted names of the settings that decide whether, where and how fast a run goes, and nothing
    of what comes out.
    """
    return frozenset(name for name, s in leaf_settings(schema).items() if s.runtime)


def given_settings(config: BaseModel) -> dict[str, Any]:
    """The settings that were given and not defaulted, by dotted name, with their values."""
    given: dict[str, Any] = {}
    for name in type(config).model_fields:
        if name not in config.model_fields_set:
            continue
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            given |= {f"{name}.{key}": leaf for key, leaf in given_settings(value).items()}
        else:
            given[name] = value
    return given


def yaml_text(value: Any) -> str:
    """A setting's value as one line of YAML, that reads as the same value."""
    if (text := _simple(value)) is not None:
        return text
    import yaml  # takes a tenth of the help's time

    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _simple(value: Any) -> str | None:
    """What needs no quotes; None for anything else."""
    if isinstance(value, tuple | list):
        items = [_simple(item) for item in value]
        return None if None in items else f"[{', '.join(map(str, items))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and math.isfinite(value):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")  # 3e-05 is a string in YAML
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return None if value.lower() in _READ_OTHERWISE else value
    return str(value) if isinstance(value, int) else None


def _type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """`whole number, at least 1; or null`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(args[0], [part for extra in args[1:] for part in _parts(extra)])
    if origin in (Union, types.UnionType):
        return "; or ".join(_type_text(arg, () if arg is type(None) else metadata) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is tuple:
        return _tuple_text(args)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    name = _NAMES.get(annotation, getattr(annotation, "__name__", ""))
    return ", ".join((name, *_bounds(metadata)))


def _tuple_text(args: tuple[Any, ...]) -> str:
    name, comma, bounds = _type_text(args[0]).partition(",")
    if args[-1] is Ellipsis:
        many = "lists" + name.removeprefix("list") if name.startswith("list of") else f"{name}s"
        return f"list of {many}{comma}{bounds}"
    return f"list of {len(args)} {name}s{comma}{bounds}"


def _parts(extra: Any) -> Iterable[Any]:
    return extra.metadata if isinstance(extra, FieldInfo) else (extra,)


def _bounds(metadata: Iterable[Any]) -> Iterator[str]:
    for part in metadata:
        for name, words in _BOUNDS.items():
            if (bound := getattr(part, name, None)) is not None:
                yield f"{words} {bound:g}"
