"""The trials of a sweep: every point of its axes, resolved to a configuration, each once."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from semalign.config.dotted import lookup, nested
from semalign.config.jobs import Config
from semalign.config.read import validate
from semalign.errors import UserError, nearest
from semalign.files import content_key
from semalign.methods.method import (
    check_effective,
    filled,
    method_of,
    unused_settings,
    used_settings,
)
from semalign.sweep.axes import Option, Range
from semalign.sweep.file import Sweep

LIMIT = 10_000  # trials that need no --yes


@dataclass(frozen=True)
class Trial:
    """One transfer of a sweep, with its effective configuration.

    `id` names the settings that decide its result, `setting` the same without the seed. `axes` has
    the value of each axis, and `label` shows them. `base`: the setting is that of the sweep's base.
    `unused`: settings of the base that have no effect in this trial, and are left out.
    """

    id: str
    setting: str
    label: str
    axes: dict[str, Any]
    seed: int
    config: Config
    base: bool = False
    unused: frozenset[str] = frozenset()


def count(sweep: Sweep) -> int:
    """How many trials the axes stand for, before repeats are removed, the base aside."""
    if sweep.search == "optuna":
        return (sweep.samples or 1) * len(sweep.seeds)
    grid = math.prod(len(axis.options) for axis in sweep.grids)
    return grid * (sweep.samples or 1) * len(sweep.seeds)


def trials(sweep: Sweep, *, yes: bool = False) -> list[Trial]:
    """Every trial once, in the order of the axes, the base's first unless they are among them.
    Where they are searched for, random ones stand for those that will be suggested.

    Of trials with the same effective settings the first is kept. Raises UserError with the label of
    a trial whose configuration is invalid or has a setting of an axis without effect, for a setting
    of the base without effect in any trial, and for more than 10,000 trials unless `yes`.
    """
    number = count(sweep)
    if number > LIMIT and not yes:
        raise UserError(
            f"sweep {sweep.name}: {number:,} trials are more than {LIMIT:,}; shorten the axes, or "
            "say --yes"
        )
    base = make_trials(sweep, {}, sweep.seeds)
    found: dict[str, Trial] = {}
    for point in points(sweep):
        for trial in make_trials(sweep, point, sweep.seeds):
            found.setdefault(trial.id, replace(trial, base=trial.setting == base[0].setting))
    if sweep.compare is None:  # otherwise all are compared with the control
        found = {trial.id: trial for trial in base if trial.id not in found} | found
    else:
        _check_control(sweep, found.values())
    if sweep.search != "optuna":  # whose trials are not known yet
        _check_base(sweep, list(found.values()))
    return [*found.values()]


def _check_base(sweep: Sweep, found: Sequence[Trial]) -> None:
    """Raise UserError for a setting of the base that has no effect in any trial."""
    given = _validated(sweep.base).model_dump(mode="json")
    without = found[0].config
    for key in sorted(frozenset[str].intersection(*(trial.unused for trial in found))):
        value = lookup(given, key)
        if value != lookup(without.model_dump(mode="json"), key):
            raise UserError(
                f"sweep {sweep.name}: base: {key}={value_text(value)}: has no effect in any trial, "
                f"here with {unused_settings(without)[key]}; leave it out"
            )


def _check_control(sweep: Sweep, found: Iterable[Trial]) -> None:
    assert sweep.compare is not None
    names = {value_text(trial.axes[sweep.compare.axis]) for trial in found}
    if sweep.compare.control not in names:
        hint = nearest(sweep.compare.control, names)
        raise UserError(
            f"sweep {sweep.name}: compare.control={sweep.compare.control}: no trial has it; {hint}"
        )


def every_trials(config: Config, held_back: str | None) -> Config:
    """A trial's configuration, scored on what every trial is scored on: all splits but the one that
    is `held_back`.
    """
    splits = config.evaluation.splits
    return config.scored_by(splits=tuple(split for split in splits if split != held_back))


def references(planned: Sequence[Trial], *, compared: bool) -> tuple[Config, list[str]]:
    """The models for comparison, and how they are scored: the student, and where methods are
    compared the teachers too, on all their tasks.
    """
    config = planned[0].config
    if not compared:
        return config, [config.student]
    tasks = tuple(dict.fromkeys(trial.config.data.task for trial in planned))
    models = dict.fromkeys(trial.config.student for trial in planned)
    models |= dict.fromkeys(trial.config.teacher for trial in planned)
    return config.scored_by(tasks=tasks), [*models]


def extremes(sweep: Sweep) -> list[Trial]:
    """What a search may suggest at most: the base; each option of an axis and each end of a range,
    the other axes at their first option or their middle; and every point of the grid with each end
    of a range of whole numbers, such as a rank.
    """
    middle = {
        axis.name: axis.option(axis.rounded((axis.low + axis.high) / 2)) for axis in sweep.ranges
    }
    usual = {axis.name: axis.options[0] for axis in sweep.grids} | middle
    alone = [{axis.name: option} for axis in sweep.grids for option in axis.options]
    alone += [end for axis in sweep.ranges for end in _ends(axis)]
    whole = [end for axis in sweep.ranges if axis.kind == "randint" for end in _ends(axis)]
    joined = [fixed | end for fixed in _grid(sweep) for end in whole or [{}]]
    points = [_in_order(sweep, usual | point) for point in (*alone, *joined)]
    return [make_trial(sweep, point, sweep.seeds[0]) for point in ({}, *points)]


def _ends(axis: Range) -> list[dict[str, Option]]:
    return [{axis.name: axis.option(axis.rounded(end))} for end in (axis.low, axis.high)]


def points(sweep: Sweep) -> Iterator[dict[str, Option]]:
    """Every point of the grid with every draw, as the option taken on each axis; in a search, a
    point of the grid for each draw.
    """
    draws = _draws(sweep)
    if sweep.search == "optuna":
        random = Random(f"{sweep.name}/grid")
        for draw in draws:
            fixed = {axis.name: random.choice(axis.options) for axis in sweep.grids}
            yield _in_order(sweep, fixed | draw)
        return
    for fixed in _grid(sweep):
        for draw in draws:
            yield _in_order(sweep, fixed | draw)


def _grid(sweep: Sweep) -> Iterator[dict[str, Option]]:
    for options in itertools.product(*(axis.options for axis in sweep.grids)):
        yield {axis.name: option for axis, option in zip(sweep.grids, options, strict=True)}


def _in_order(sweep: Sweep, point: Mapping[str, Option]) -> dict[str, Option]:
    """In the order of the axes, of which the later wins."""
    return {axis.name: point[axis.name] for axis in sweep.axes}


def _draws(sweep: Sweep) -> list[dict[str, Option]]:
    """The same at each call: from the names of sweep and axis. More samples add to the fewer."""
    random = {axis.name: Random(f"{sweep.name}/{axis.name}") for axis in sweep.ranges}
    return [
        {axis.name: axis.option(axis.draw(random[axis.name])) for axis in sweep.ranges}
        for _ in range(sweep.samples or 1)
    ]


def make_trial(sweep: Sweep, point: Mapping[str, Option], seed: int) -> Trial:
    """The trial at a point (none: the base). Raises UserError with its label when invalid."""
    return make_trials(sweep, point, [seed])[0]


def make_trials(sweep: Sweep, point: Mapping[str, Option], seeds: Sequence[int]) -> list[Trial]:
    """The trials at a point, one a seed. Raises UserError with their label when invalid."""
    try:
        config, unused = _configured(sweep, point)
    except UserError as error:
        label = _label({name: option.value for name, option in point.items()})
        raise UserError(f"sweep {sweep.name}: trial {label}: {error}") from None
    used = used_settings(config)
    axes = _axes(sweep, point, config, used)
    setting, label = content_key({**used, "seed": None}), _label(axes)
    return [
        Trial(
            id=content_key({**used, "seed": seed}),
            setting=setting,
            label=label,
            axes=axes,
            seed=seed,
            config=config.model_copy(update={"seed": seed}),
            base=not point,
            unused=unused,
        )
        for seed in seeds
    ]


def _axes(
    sweep: Sweep, point: Mapping[str, Option], config: Config, used: Mapping[str, Any]
) -> dict[str, Any]:
    """The value of each axis as the configuration has it; the name of a case."""
    cases = {axis.name for axis in sweep.grids if axis.named}
    plain = [name for name in point if name not in cases]
    if any(name not in used for name in plain):  # a section, or the value that it has anyway
        tree = config.model_dump(mode="json")
        return {n: option.value if n in cases else lookup(tree, n) for n, option in point.items()}
    return {n: option.value if n in cases else used[n] for n, option in point.items()}


def _configured(sweep: Sweep, point: Mapping[str, Option]) -> tuple[Config, frozenset[str]]:
    """The effective configuration, and the settings of the base that have no effect in it.

    Raises UserError for such a setting of the point itself.
    """
    own: dict[str, Any] = {}
    for option in point.values():
        own |= option.settings
    config = _validated({**sweep.base, **own})
    found = filled(config)
    unused = unused_settings(found)
    left_out = frozenset(key for key in sweep.base if key in unused and key not in own)
    if left_out:
        kept = {key: value for key, value in sweep.base.items() if key not in left_out}
        config = _validated({**kept, **own})
        found = filled(config)
    check_effective(config, found)
    if sweep.compare is not None:
        found = _own_task(found)
    if sweep.scheduler is not None and method_of(found).rank(found) is None:
        raise UserError(
            "scheduler: between epochs engines take up LoRA adapters alone, and this is a "
            "whole student; leave the scheduler out"
        )
    return found, left_out


def _validated(settings: Mapping[str, Any]) -> Config:
    """As `validate`, section by section: trials have most of their sections in common."""
    sections: dict[str, list[tuple[str, Any]]] = {}
    for key, value in settings.items():
        section, dot, _ = key.partition(".")
        sections.setdefault(section if dot else "", []).append((key, value))
    parts = {name: _part(tuple(given)) for name, given in sections.items()}
    config = parts.pop("", None) or _part(())
    return config.model_copy(update={name: getattr(own, name) for name, own in parts.items()})


def _part(settings: tuple[tuple[str, Any], ...]) -> Config:
    try:
        return _cached_part(_hashable(settings))
    except (TypeError, UserError):  # the error is to show the value as it was given
        return validate(nested(dict(settings)))


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


@functools.lru_cache(maxsize=4096)
def _cached_part(settings: tuple[tuple[str, Any], ...]) -> Config:
    return validate(nested(dict(settings)))


def _own_task(config: Config) -> Config:
    """The same, scored on the task that it is trained on. Raises UserError if that is not among
    the tasks of the evaluation, on which the models for comparison are scored.
    """
    if config.data.task not in config.evaluation.tasks:
        hint = nearest(config.data.task, config.evaluation.tasks)
        raise UserError(f"data.task={config.data.task}: not in evaluation.tasks; {hint}")
    return config.scored_by(tasks=(config.data.task,))


def _label(axes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value_text(value)}" for name, value in axes.items()) or "base"


def value_text(value: Any) -> str:
    """A value of an axis for people: `0.1`, `dual`, `[[6,4]]`."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), default=str)  # YAML has dates
