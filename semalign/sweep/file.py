"""A sweep as a file: a base configuration, axes, and how the best setting is chosen.

    name: loss-weights              # default: the file's name
    description: one sentence
    base: {data: {task: mmlu}, training.lr: 3.0e-3}     # settings of every trial
    axes:
      loss.alpha: [0.1, 0.3, 1]               # a grid
      loss.beta: {uniform: [0, 1]}            # a range: uniform, loguniform, randint (both ends)
      pairing.explicit: all                   # each single (teacher, student) pair
      variant:                                # any name: settings that move together
        cases:
          cross-entropy: {loss.alpha: 0}
          dual: {alignment.map: dual}
    samples: 8                      # draws of the ranges, each at every point of the grid
    seeds: [0, 1, 2]
    select: {metric: mmlu, split: dev, mode: max}
    report: {split: test}
    scheduler: {asha: {grace_epochs: 1, reduction_factor: 3}}
    search: random                  # or optuna, which learns from the scores (the extra `search`)
    max_concurrent: 2

Where two axes set the same key, the later one wins. The base is a trial too, the one that all the
others are compared with.

A file may set methods side by side instead of choosing among settings:

    compare: {axis: variant, control: cross-entropy}    # a trial is scored on its own data.task
    models:                         # `models=llama2` on the command line takes these instead
      llama2: {base: {teacher: ..., student: ...}, axes: {...}}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from semalign.config.dotted import expand, flat, lookup, nested
from semalign.config.jobs import Config
from semalign.config.read import environment_settings, parse_override, read_yaml, validate
from semalign.config.sections import Settings
from semalign.errors import UserError, nearest
from semalign.plugins import load_plugins
from semalign.sweep.axes import Axis, Choices, Range, check_names, read_axis


class Select(Settings):
    """The score that the best setting has."""

    metric: str | None = None
    """Task whose score chooses; null: the one that is trained on."""
    split: str = "dev"
    """Split whose score chooses; never the one that is reported."""
    mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest score is the best."""


class Report(Settings):
    """Where the chosen setting and the base are shown."""

    split: str = "test"
    """Split that is reported, once."""


class Compare(Settings):
    """Sets the values of one axis side by side, task by task, each against its value `control`.

    Nothing is chosen, so all of them are shown on the report split. A trial is scored on the task
    that it is trained on.
    """

    axis: str
    """Axis whose values are compared."""
    control: Annotated[str, Field(coerce_numbers_to_str=True)]
    """Value of the axis that all others are compared with."""


class Asha(Settings):
    """Stops the worse of the trials: the first may after `grace_epochs`, then after
    `reduction_factor` times as many, and so on.
    """

    grace_epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs before a trial may be stopped."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Of so many trials one goes on, and for so many times as many epochs."""


class Scheduler(Settings):
    """What stops trials early."""

    asha: Asha = Field(default_factory=Asha)


class Sweep(Settings):
    """A sweep file, checked; `base` has dotted keys, and `axes` are read."""

    name: str
    """Name of the sweep; the file's name, unless given."""
    description: str = ""
    """One sentence for the tables."""
    base: dict[str, Any]
    """Settings of every trial."""
    axes: tuple[Axis, ...]
    """What varies: grids, ranges and cases."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Draws of the ranges, each at every point of the grid; null: there are no ranges."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """Seeds of every point, a trial each."""
    select: Select = Field(default_factory=Select)
    report: Report = Field(default_factory=Report)
    compare: Compare | None = None
    """Compare the values of an axis instead of choosing among settings; null: choose."""
    scheduler: Scheduler | None = None
    """Stop the worse trials early; null: train all of them to the end."""
    search: Literal["random", "optuna"] | None = None
    """How ranges are drawn: at random, or by Optuna from the scores so far; null: at random."""
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Most trials that run at a time; null: as many as can train."""

    def metric(self, task: str) -> tuple[str, str]:
        """The task and split that a trial trained on `task` is judged by."""
        if self.compare is not None:
            return task, self.report.split
        return str(self.select.metric), self.select.split

    @property
    def held_back(self) -> str | None:
        """The split on which only the base and the chosen setting are scored; None where nothing is
        chosen.
        """
        return self.report.split if self.compare is None else None

    @property
    def ranges(self) -> tuple[Range, ...]:
        return tuple(axis for axis in self.axes if isinstance(axis, Range))

    @property
    def grids(self) -> tuple[Choices, ...]:
        return tuple(axis for axis in self.axes if isinstance(axis, Choices))


def load_sweep(file: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """Read a sweep file. `key=value` overrides its base, `sweep.key=value` the sweep itself, and
    `models=name` takes that one of its sets of models.

    Raises UserError of one line, with the file, the key and the nearest valid one.
    """
    file = Path(file)
    tree = {"name": file.stem, "base": {}, "axes": {}, **_sections(read_yaml(file))}
    with naming(file):
        _check_sections(tree)
        overrides = _choose_models(tree, list(overrides))
        for_base = _apply(tree, overrides)
        _check_sections(tree)
        settings = environment_settings() | flat(tree["base"]) | for_base
        usual = [*([] if tree.get("compare") else [Select().split]), Report().split]
        settings = {"evaluation.splits": usual} | settings
        base = _base(settings)
        tree["axes"] = tuple(
            read_axis(str(name), axis, base) for name, axis in tree["axes"].items()
        )
        _refuse_swept(for_base, tree["axes"])
        tree["base"] = settings | {"workdir": base.workdir}
        sweep: Sweep = validate(tree, Sweep)  # type: ignore[type-var]
        if sweep.compare is not None:
            _check_compared(sweep, base)
        else:
            metric = sweep.select.metric or base.data.task
            select = sweep.select.model_copy(update={"metric": metric})
            sweep = sweep.model_copy(update={"select": select})
            _check_scores(sweep, base)
        _check_draws(sweep)
    return sweep


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Put `where` before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _sections(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """The file by its sections, where keys such as `select.split` are dotted. Within `base` and
    `axes` they stay so: an axis' name has dots of its own.
    """
    sections: dict[str, Any] = {}
    for key, value in tree.items():
        section, _, rest = str(key).partition(".")
        inner, old = {rest: value} if rest else value, sections.get(section)
        if isinstance(inner, Mapping) and isinstance(old, Mapping):
            inner = {**old, **inner}
        sections[section] = inner
    kept = ("base", "axes", "models")
    others = {key: value for key, value in sections.items() if key not in kept}
    return sections | expand(others)


def _check_sections(tree: Mapping[str, Any]) -> None:
    for section in ("base", "axes"):
        if not isinstance(tree[section], Mapping):
            raise UserError(f"{section}={tree[section]!r}: expected a mapping of settings")


def _choose_models(tree: dict[str, Any], overrides: list[str]) -> list[str]:
    """Merge the chosen set of models into base and axes; returns the other overrides."""
    sets = tree.pop("models", {})
    if not isinstance(sets, Mapping):
        raise UserError(f"models={sets!r}: expected {{name: {{base: settings, axes: axes}}}}")
    for name, given in sets.items():
        _check_models(f"models.{name}", given)
    for word in (text for text in overrides if text.startswith("models=")):
        name = word.removeprefix("models=")
        if name not in sets:
            hint = nearest(name, sets) if sets else "the file has no sets of models"
            raise UserError(f"models={name}: {hint}")
        chosen = {"base": {}, "axes": {}, **sets[name]}
        tree["base"] = flat(tree["base"]) | flat(chosen["base"])
        tree["axes"] = {**tree["axes"], **chosen["axes"]}
    return [text for text in overrides if not text.startswith("models=")]


def _check_models(where: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise UserError(f"{where}={given!r}: expected {{base: settings, axes: axes}}")
    for section, settings in given.items():
        if section not in ("base", "axes"):
            hint = nearest(str(section), ("base", "axes"))
            raise UserError(f"{where}.{section}: unknown key; {hint}")
        if not isinstance(settings, Mapping):
            raise UserError(f"{where}.{section}={settings!r}: expected a mapping of settings")


def _apply(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Write the overrides of the sweep itself into `tree`; returns those of its base, dotted."""
    base: dict[str, Any] = {}
    for text in overrides:
        key, given = text.partition("=")[0], parse_override(text)
        if not key.startswith("sweep."):
            base |= flat(given)
            continue
        section, _, rest = key.removeprefix("sweep.").partition(".")
        value, held = lookup(given, key), tree.get(section)
        old = held if isinstance(held, Mapping) else {}
        if not rest:
            tree[section] = value
        elif section == "axes":  # an axis' name has dots of its own
            tree[section] = {**old, rest: value}
        else:
            tree[section] = nested(flat(old) | flat({rest: value}))
    return base


def _base(settings: Mapping[str, Any]) -> Config:
    if "seed" in settings:
        raise UserError("base.seed: the seeds are an axis of their own, e.g. seeds: [0, 1, 2]")
    with naming("base"):
        config = validate(nested(settings))
        load_plugins(config.plugins)
    check_names(settings, "base")
    for task in config.evaluation.tasks:
        check_names({"data.task": task}, "base.evaluation.tasks")
    return config.model_copy(update={"workdir": str(Path(config.workdir).expanduser().resolve())})


def _refuse_swept(overrides: Iterable[str], axes: Iterable[Axis]) -> None:
    for key, axis in itertools.product(overrides, axes):
        if key in axis.keys:
            raise UserError(
                f"{key}: axis '{axis.name}' sets it, so an override of the base would change the "
                f"base alone; expected sweep.axes.{axis.name}=... or sweep.base.{key}=..."
            )


def _check_draws(sweep: Sweep) -> None:
    if sweep.ranges and sweep.samples is None:
        raise UserError(f"axes.{sweep.ranges[0].name}: a range needs samples, e.g. samples: 8")
    if sweep.samples is not None and not sweep.ranges:
        raise UserError(f"samples={sweep.samples}: no axis is a range, there is nothing to draw")
    if sweep.search == "optuna" and not sweep.ranges:
        raise UserError("search=optuna: no axis is a range, there is nothing to search")


def _check_compared(sweep: Sweep, base: Config) -> None:
    assert sweep.compare is not None
    grids = {axis.name: axis for axis in sweep.grids}
    if sweep.compare.axis not in grids:
        hint = nearest(sweep.compare.axis, grids) if grids else "the sweep has no grid axis"
        raise UserError(f"compare.axis={sweep.compare.axis}: {hint}")
    if sweep.search == "optuna":
        raise UserError(
            "search=optuna: a comparison chooses nothing, and its scores are the report split's; "
            "leave it out"
        )
    if sweep.scheduler is not None:
        raise UserError("scheduler: what is compared is trained to the end; leave it out")
    if sweep.report.split not in base.evaluation.splits:
        hint = nearest(sweep.report.split, base.evaluation.splits)
        raise UserError(f"report.split={sweep.report.split}: not in evaluation.splits; {hint}")


def _check_scores(sweep: Sweep, base: Config) -> None:
    select, evaluation = sweep.select, base.evaluation
    if select.metric not in evaluation.tasks:
        hint = nearest(str(select.metric), evaluation.tasks)
        raise UserError(f"select.metric={select.metric}: not in evaluation.tasks; {hint}")
    for key, split in (("select.split", select.split), ("report.split", sweep.report.split)):
        if split not in evaluation.splits:
            hint = nearest(split, evaluation.splits)
            raise UserError(f"{key}={split}: not in evaluation.splits; {hint}")
    if select.split in ("test", sweep.report.split):
        raise UserError(
            f"select.split={select.split}: a setting is not chosen on the split that is reported; "
            "expected a held-out one, such as dev"
        )
