"""The axes of a sweep: what varies, and the settings that each of its points stands for.

Settings are dotted keys of the configuration here (`loss.alpha`), nested or dotted in files.
"""

from __future__ import annotations

import difflib
import functools
import math
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, get_args

from pydantic import BaseModel

from semalign.config.describe import runtime_settings
from semalign.config.dotted import flat
from semalign.config.jobs import Config, task_name
from semalign.core.pairing import STRATEGIES, all_pairs
from semalign.errors import UserError, nearest

RANGE_KINDS = ("uniform", "loguniform", "randint")
# A sweep compares trials under one evaluation, and has an axis of its own for the seed.
FIXED = {
    "seed": "the seeds are an axis of their own, e.g. seeds: [0, 1, 2]",
    "evaluation": "all trials are scored alike; set it in base",
    "dtype": "all trials are scored alike; set it in base",
    "trust_remote_code": "all trials are scored alike; set it in base",
    "workdir": "all trials share it; set it in base",
    "tracking": "all trials share it; set it in base",
    "cluster": "all trials share it; set it in base",
}


_RUNTIME = "it decides where a run goes and not what comes out; set it in base"


@dataclass(frozen=True)
class Option:
    """One point of an axis: its name or value, and the settings it makes."""

    value: Any
    settings: dict[str, Any]


@dataclass(frozen=True)
class Choices:
    """A grid axis: one setting and its values or, when `named`, cases that set several."""

    name: str
    options: tuple[Option, ...]
    named: bool = False

    @property
    def keys(self) -> set[str]:
        """The settings it makes."""
        return {key for option in self.options for key in option.settings}


@dataclass(frozen=True)
class Range:
    """Draws of one setting; `randint` includes both ends."""

    name: str
    kind: str
    low: float
    high: float

    @property
    def keys(self) -> set[str]:
        return {self.name}

    def draw(self, random: Random) -> float:
        if self.kind == "randint":
            return random.randint(int(self.low), int(self.high))
        if self.kind == "uniform":
            return self.rounded(random.uniform(self.low, self.high))
        return self.rounded(math.exp(random.uniform(math.log(self.low), math.log(self.high))))

    def rounded(self, value: float) -> float:
        """To four significant digits, so that its label is the value itself."""
        if self.kind == "randint":
            return int(value)
        return min(max(float(f"{value:.4g}"), self.low), self.high)

    def option(self, value: float) -> Option:
        return Option(value, {self.name: value})


Axis = Choices | Range


def read_axis(name: str, given: Any, base: Config) -> Axis:
    """An axis as a file gives it. Raises UserError naming the axis and the nearest valid setting.

    An axis of `pairing.explicit` also sets the strategy of that name; `all` there stands for every
    single pair of layers of the base's two models.
    """
    where = f"axes.{name}"
    tag = f"axis.{name}"  # in MLflow, which has its rules
    if not re.fullmatch(r"[\w\-. :/]{1,200}", name) or posixpath.normpath(tag) != tag:
        raise UserError(
            f"{where}: expected a name that MLflow takes: letters, digits, spaces and . : / _ -, "
            "200 at most, but no / at its end or next to another"
        )
    axis = _read(where, name, given, base)
    for option in axis.options if isinstance(axis, Choices) else ():
        check_names(option.settings, where)
    if "data.root" in axis.keys and base.evaluation.root is None:
        raise UserError(
            f"{where}: trials would be scored on the rows of their own data.root; set "
            "evaluation.root in base, for all trials are scored alike"
        )
    return axis


def _read(where: str, name: str, given: Any, base: Config) -> Axis:
    if isinstance(given, Mapping) and "cases" in given:
        return _read_cases(where, name, given)
    check_setting(name, where)
    if given in ("all", {"all": True}) and name == "pairing.explicit":
        given = [[list(pair)] for pair in _every_pair(base)]
    if isinstance(given, list):
        if not given:
            raise UserError(f"{where}: empty; expected at least one value")
        options = tuple(Option(value, _settings(name, value)) for value in given)
        for key in {key for option in options for key in option.settings} & _runtime():
            check_setting(key, where)
        return Choices(name, options)
    if isinstance(given, Mapping) and len(given) == 1:
        return _read_range(where, name, *next(iter(given.items())))
    raise UserError(
        f"{where}={given!r}: expected a list of values, a range such as {{uniform: [0, 1]}}, or "
        "{cases: {name: {setting: value}}}"
    )


def check_setting(key: str, where: str) -> None:
    """Raise UserError unless `key` is a setting, or a section, that trials may differ in."""
    section = key.split(".")[0]
    if section not in FIXED and key in _runtime():
        raise UserError(f"{where}: {key} cannot be an axis; {_RUNTIME}")
    if section in FIXED:
        raise UserError(f"{where}: {key} cannot be an axis; {FIXED[section]}")
    names = [name for name in _names(Config) if name.split(".")[0] not in FIXED]
    if key not in names:
        close = difflib.get_close_matches(key, names)
        hint = nearest(key, names if close else set(Config.model_fields) - set(FIXED))
        raise UserError(f"{where}: {key} is no setting; {hint}")


def check_names(settings: Mapping[str, Any], where: str) -> None:
    """Raise UserError for an unknown name of a method, task, strategy, objective or map."""
    for key, names in _registered().items() if settings else ():
        if key in settings and task_name(settings[key]) not in names:
            raise UserError(f"{where}: {key}={settings[key]}: {nearest(str(settings[key]), names)}")


def _registered() -> dict[str, Mapping[str, Any]]:
    """The registries of the settings whose values are names."""
    from semalign.core.losses import OBJECTIVES  # imports torch, which takes seconds
    from semalign.methods import METHODS
    from semalign.stages.mapping import MAPS
    from semalign.tasks import TASKS

    return {
        "method": METHODS,
        "data.task": TASKS,
        "pairing.strategy": STRATEGIES,
        "loss.objective": OBJECTIVES,
        "alignment.map": MAPS,
    }


@functools.cache
def _runtime() -> frozenset[str]:
    return runtime_settings(Config)


def _names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted names of all settings and sections."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names += _names(kind, f"{prefix}{name}.")
    return names


def _settings(name: str, value: Any) -> dict[str, Any]:
    settings = flat({name: value})
    return {"pairing.strategy": "explicit", **settings} if name == "pairing.explicit" else settings


def _every_pair(base: Config) -> list[tuple[int, int]]:
    from semalign.models.loading import load_config  # imports transformers, which takes seconds

    counts = [
        load_config(path, trust_remote_code=base.trust_remote_code).get_text_config()
        for path in (base.teacher, base.student)
    ]
    return all_pairs(*(count.num_hidden_layers for count in counts))


def _read_cases(where: str, name: str, given: Mapping[str, Any]) -> Choices:
    cases = given["cases"]
    if others := [key for key in given if key != "cases"]:
        raise UserError(f"{where}.{others[0]}: unknown key; expected only cases")
    if not isinstance(cases, Mapping) or not cases:
        raise UserError(f"{where}.cases: empty; expected {{name: {{setting: value}}}}")
    options = []
    for case, settings in cases.items():
        if not isinstance(settings, Mapping):
            raise UserError(
                f"{where}.cases.{case}={settings!r}: expected settings such as {{loss.alpha: 0}}"
            )
        for key in flat(settings):
            check_setting(key, f"{where}.cases.{case}")
        options.append(Option(str(case), flat(settings)))
    return Choices(name, tuple(options), named=True)


def _read_range(where: str, name: str, kind: str, ends: Any) -> Range:
    if kind not in RANGE_KINDS:
        raise UserError(f"{where}.{kind}: unknown kind of range; {nearest(kind, RANGE_KINDS)}")
    try:
        low, high = (float(end) for end in ends)  # 1e-4 without a dot is a string in YAML
    except (TypeError, ValueError):
        raise UserError(f"{where}.{kind}={ends!r}: expected [low, high], two numbers") from None
    if not low < high or not math.isfinite(high - low):
        raise UserError(f"{where}.{kind}={ends!r}: low must be below high")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{where}.{kind}={ends!r}: a logarithm needs ends above 0")
    if kind == "randint" and not (low.is_integer() and high.is_integer()):
        raise UserError(f"{where}.{kind}={ends!r}: expected whole numbers")
    return Range(name, kind, low, high)
