"""The activation stores of a sweep: which columns its trials need of each, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from semalign.artifacts.activations import Column
from semalign.stages.costs import Step, extract_step, prefix_step
from semalign.stages.trial_plan import TrialPlan


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """One activation store and what its trials (their ids) need of it together.

    `columns`: layers from 0. `undecided`: how many more attribution may ask for, at most, or
    `exact`: just as many, when it decides on a single layer and there is no other. `naive`: how
    many columns the trials would fill one by one.
    """

    model: str
    trials: tuple[str, ...]
    columns: tuple[Column, ...]
    undecided: int
    exact: bool
    naive: int
    step: Step


def groups(plans: Iterable[TrialPlan], key: str) -> list[list[TrialPlan]]:
    """The trials that share a file; those that do without it are left."""
    found: dict[str, list[TrialPlan]] = {}
    for plan in plans:
        if (name := getattr(plan, key)) is not None:
            found.setdefault(name, []).append(plan)
    return list(found.values())


def extractions(plans: Iterable[TrialPlan]) -> tuple[StorePlan, ...]:
    """The teachers' stores."""
    return tuple(map(_extraction, groups(plans, "store")))


def _extraction(group: list[TrialPlan]) -> StorePlan:
    """The teacher's store that these trials share."""
    first = group[0]
    wanted = frozenset[tuple[object, str]]().union(*(plan.columns for plan in group))
    known = sorted(Column(layer, name) for layer, name in wanted if isinstance(layer, int))
    named = {(layer, name) for layer, name in wanted if not isinstance(layer, int)}
    interfaces = {name for _, name in named}
    held = {name: sum(column.interface == name for column in known) for name in interfaces}
    possible = {name: held[name] + sum(n == name for _, n in named) for name in interfaces}
    undecided = sum(min(possible[n], first.teacher.layers) - held[n] for n in interfaces)
    alone = len({layer for layer, _ in named}) == 1 and not any(held.values())
    deepest = first.teacher.layers if undecided else max(column.layer for column in known) + 1
    count = len(known) + undecided
    return StorePlan(
        model=first.config.teacher,
        trials=tuple(plan.trial.id for plan in group),
        columns=tuple(known),
        undecided=undecided,
        exact=not undecided or alone,
        naive=sum(len(plan.columns) for plan in group),
        step=extract_step(first.config, first.inputs, first.teacher, columns=count, layers=deepest),
    )


def prefixes(plans: Iterable[TrialPlan]) -> tuple[StorePlan, ...]:
    """The students' stores."""
    return tuple(map(_prefix, groups(plans, "prefix")))


def _prefix(group: list[TrialPlan]) -> StorePlan:
    """The student's store that these trials share: a column a swept k."""
    first = group[0]
    wanted = {plan.first for plan in group}
    known = sorted(Column(layer, "input") for layer in wanted if isinstance(layer, int))
    undecided = min(len(wanted), first.student.layers) - len(known)
    deepest = first.student.layers if undecided else known[-1].layer + 1
    count = len(known) + undecided
    return StorePlan(
        model=first.config.student,
        trials=tuple(plan.trial.id for plan in group),
        columns=tuple(known),
        undecided=undecided,
        exact=not undecided or len(wanted) == 1,
        naive=len(group),
        step=prefix_step(first.config, first.inputs, first.student, columns=count, layers=deepest),
    )
