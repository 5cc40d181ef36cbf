"""The trials of a sweep: every point of its axes, resolved to a configuration, each once."""

from __future__ import annotations

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
from semalign.sweep.axes import Option, Range
from semalign.sweep.file import Sweep, naming

LIMIT = 10_000  # trials that need no --yes
HARDWARE = {"workdir", "tracking", "cluster"}  # no part of what a trial is


@dataclass(frozen=True)
class Trial:
    """One transfer of a sweep.

    `id` is of all that decides its result, `setting` of the same without the seed. `axes` has the
    value of each axis, which `label` says. `base`: the setting is that of the sweep's base.
    """

    id: str
    setting: str
    label: str
    axes: dict[str, Any]
    seed: int
    config: Config
    base: bool = False


def count(sweep: Sweep) -> int:
    """How many trials the axes stand for, before repeats are removed, the base aside."""
    if sweep.search == "optuna":
        return (sweep.samples or 1) * len(sweep.seeds)
    grid = math.prod(len(axis.options) for axis in sweep.grids)
    return grid * (sweep.samples or 1) * len(sweep.seeds)


def trials(sweep: Sweep, *, yes: bool = False) -> list[Trial]:
    """Every trial once, in the order of the axes, the base's first unless they are among them.
    Where they are searched for, random ones stand for those that will be suggested.

    Of trials with the same configuration the first is kept. Raises UserError with the label of a
    trial whose configuration is invalid, and for more than 10,000 trials unless `yes`.
    """
    number = count(sweep)
    if number > LIMIT and not yes:
        raise UserError(
            f"sweep {sweep.name}: {number:,} trials are more than {LIMIT:,}; shorten the axes, or "
            "say --yes"
        )
    base = [make_trial(sweep, {}, seed) for seed in sweep.seeds]
    found: dict[str, Trial] = {}
    for point, seed in itertools.product(points(sweep), sweep.seeds):
        trial = make_trial(sweep, point, seed)
        found.setdefault(trial.id, replace(trial, base=trial.setting == base[0].setting))
    if sweep.compare is not None:  # then the control is what all are set beside
        _check_control(sweep, found.values())
        return [*found.values()]
    missing = {trial.id: trial for trial in base if trial.id not in found}
    return [*(missing | found).values()]


def _check_control(sweep: Sweep, found: Iterable[Trial]) -> None:
    assert sweep.compare is not None
    names = {show(trial.axes[sweep.compare.axis]) for trial in found}
    if sweep.compare.control not in names:
        hint = nearest(sweep.compare.control, names)
        raise UserError(
            f"sweep {sweep.name}: compare.control={sweep.compare.control}: no trial has it; {hint}"
        )


def references(planned: Sequence[Trial], *, compared: bool) -> tuple[Config, list[str]]:
    """The models to set beside, and how they are scored: the student, and where methods are
    compared the teachers too, on all their tasks.
    """
    config = planned[0].config
    if not compared:
        return config, [config.student]
    tasks = tuple(dict.fromkeys(trial.config.data.task for trial in planned))
    evaluation = config.evaluation.model_copy(update={"tasks": tasks})
    models = dict.fromkeys(trial.config.student for trial in planned)
    models |= dict.fromkeys(trial.config.teacher for trial in planned)
    return config.model_copy(update={"evaluation": evaluation}), [*models]


def extremes(sweep: Sweep) -> list[Trial]:
    """What a search may ask for at most: the base, also with each option of an axis and each end of
    a range; and every point of the grid with each end of a range of whole numbers, such as a rank,
    the other ranges at their middle.
    """
    alone = [{axis.name: option} for axis in sweep.grids for option in axis.options]
    alone += [end for axis in sweep.ranges for end in _ends(axis)]
    middle = {
        axis.name: axis.option(axis.rounded((axis.low + axis.high) / 2)) for axis in sweep.ranges
    }
    whole = [end for axis in sweep.ranges if axis.kind == "randint" for end in _ends(axis)]
    joined = [
        _in_order(sweep, fixed | middle | end) for fixed in _grid(sweep) for end in whole or [{}]
    ]
    return [make_trial(sweep, point, sweep.seeds[0]) for point in ({}, *alone, *joined)]


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
    settings = dict(sweep.base)
    for option in point.values():
        settings |= option.settings
    raw = {name: option.value for name, option in point.items()}
    with naming(f"sweep {sweep.name}: trial {_label(raw)}"):
        config = validate(nested(settings | {"seed": seed}))
        if sweep.compare is not None:
            config = _own_task(config)
        if sweep.scheduler is not None and config.adapter_rank is None:
            raise UserError(
                "scheduler: between epochs engines take up LoRA adapters alone, and this is a "
                "whole student; leave the scheduler out"
            )
    content = config.model_dump(mode="json", exclude=HARDWARE)
    cases = {axis.name for axis in sweep.grids if axis.named}
    axes = {name: raw[name] if name in cases else lookup(content, name) for name in point}
    return Trial(
        id=content_key(content),
        setting=content_key({**content, "seed": None}),
        label=_label(axes),
        axes=axes,
        seed=seed,
        config=config,
        base=not point,
    )


def _own_task(config: Config) -> Config:
    """The same, scored on the task that it is trained on. Raises UserError if that is not among
    the tasks of the evaluation, on which models are scored beside.
    """
    if config.data.task not in config.evaluation.tasks:
        hint = nearest(config.data.task, config.evaluation.tasks)
        raise UserError(f"data.task={config.data.task}: not in evaluation.tasks; {hint}")
    own = config.evaluation.model_copy(update={"tasks": (config.data.task,)})
    return config.model_copy(update={"evaluation": own})


def _label(axes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={show(value)}" for name, value in axes.items()) or "base"


def show(value: Any) -> str:
    """A value of an axis for people: `0.1`, `dual`, `[[6,4]]`."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), default=str)  # YAML has dates
