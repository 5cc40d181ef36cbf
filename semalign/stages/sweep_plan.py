"""What a sweep will do and cost, without loading a weight: all trials together, and one by one.

Trials share whatever is equal: an attribution, an activation store, a map, an adapter, an engine.
Layers that attribution has yet to decide are counted as if they differed, up to the layers that
there are: the figures are then upper bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from semalign.config.jobs import Config
from semalign.stages.costs import (
    BYTES,
    Step,
    align_step,
    attribute_step,
    evaluate_step,
    evaluated_items,
    served_bytes,
    similarity_step,
    train_step,
)
from semalign.stages.inputs import Inputs
from semalign.stages.method_costs import seek_step, trained_parameters, translate_step
from semalign.stages.store_plan import StorePlan, extractions, groups, prefixes
from semalign.stages.trial_plan import TrialPlan, plan_trials, share_inputs
from semalign.sweep.trials import Trial, references

RATE = 1e14  # operations a second, to say operations in hours of a GPU: a round assumption


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What is done, and its stages: `items` are prompts answered, each as often as sampled."""

    attributions: int
    extractions: int
    columns: int
    prefixes: int
    maps: int
    trainings: int
    engines: int
    items: int
    steps: tuple[Step, ...]

    @property
    def stored(self) -> int:
        """Bytes of the teacher's and the student's stores."""
        return sum(step.disk for step in self.steps if step.name in ("extract", "prefix"))

    @property
    def disk(self) -> int:
        """With maps and students that have a whole new layer: about."""
        return sum(step.disk for step in self.steps)

    @property
    def operations(self) -> float:
        return sum(step.operations for step in self.steps)


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The sweep, `once`, and its trials one by one, `naive`: each a transfer from a clean state."""

    trials: int
    settings: int
    seeds: int
    extractions: tuple[StorePlan, ...]
    prefixes: tuple[StorePlan, ...]
    once: Totals
    naive: Totals
    plans: tuple[TrialPlan, ...]
    absent: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether columns, trainings and bytes are what the run's will be, and no upper bounds."""
        return all(store.exact for store in (*self.extractions, *self.prefixes))

    @property
    def decided(self) -> bool:
        """Whether all layers are known, so that operations and memory are no upper bounds."""
        return not any(store.undecided for store in (*self.extractions, *self.prefixes))

    @property
    def peak(self) -> Step:
        """The stage with the largest actor."""
        return max(self.once.steps, key=lambda step: step.memory)


def plan_sweep(
    trials: Sequence[Trial], inputs: Mapping[str, Inputs] | None = None, *, compared: bool = False
) -> SweepPlan:
    """Plan all trials together, `compared` where their sweep chooses nothing. `inputs` by trial id
    are read (`share_inputs`) unless given.

    Raises UserError for whatever a trial's inputs lack.
    """
    plans = plan_trials(trials, share_inputs(trials, planned=True) if inputs is None else inputs)
    transfers = [_totals([p], (p.config, [p.config.student, p.config.teacher])) for p in plans]
    return SweepPlan(
        trials=len(plans),
        settings=len({plan.trial.setting for plan in plans}),
        seeds=len({plan.trial.seed for plan in plans}),
        extractions=extractions(plans),
        prefixes=prefixes(plans),
        once=_totals(plans, references(trials, compared=compared)),
        naive=_sum(transfers),
        plans=tuple(plans),
        absent=tuple(dict.fromkeys(path for plan in plans for path in plan.inputs.absent)),
    )


def _totals(plans: list[TrialPlan], beside: tuple[Config, Iterable[str]]) -> Totals:
    """Of trials that share all that they can.

    `beside`: the models that are scored with the results, and the settings by which they are.
    """
    attributions = [group[0] for group in groups(plans, "attribution")]
    similarities = [group[0] for group in groups(plans, "similarity")]
    maps = [group[0] for group in groups(plans, "map")]
    factors = [group[0] for group in groups(plans, "factors")]
    trainings = [group[0] for group in groups(plans, "training")]
    said, inputs = extractions(plans), prefixes(plans)
    shapes = {plan.config.teacher: plan.teacher for plan in plans}
    shapes |= {plan.config.student: plan.student for plan in plans}
    config, models = beside
    first, alone = plans[0], {*models, *(plan.config.student for plan in plans)}
    bare = [(config, shapes[model]) for model in dict.fromkeys(models)]
    made = [(plan.config, plan.student) for plan in trainings]
    items = [evaluated_items(settings) for settings, _ in bare + made]
    asked = sum(n * shape.weights for n, (_, shape) in zip(items, bare + made, strict=True))
    largest = max(
        *(served_bytes(*each) for each in bare),
        *(served_bytes(*each, transferred=True) for each in made),
    )
    steps = (
        *(attribute_step(plan.config, plan.inputs, plan.teacher) for plan in attributions),
        *(similarity_step(p.config, p.inputs, p.teacher, p.student) for p in similarities),
        *(store.step for store in (*said, *inputs)),
        *(align_step(plan.config, plan.inputs, plan.teacher, plan.student) for plan in maps),
        *(seek_step(plan.config, plan.inputs, plan.teacher) for plan in factors),
        *map(_training, trainings),
        evaluate_step(first.config, first.inputs, asked=float(asked), largest=largest),
    )
    engines = len(alone) + sum(plan.whole for plan in trainings)
    return Totals(
        attributions=len(attributions),
        extractions=len(said),
        columns=sum(len(store.columns) + store.undecided for store in said),
        prefixes=sum(len(store.columns) + store.undecided for store in inputs),
        maps=len(maps),
        trainings=len(trainings),
        engines=engines * first.config.evaluation.num_engines,
        items=sum(items),
        steps=_by_name(steps),
    )


def _sum(parts: Sequence[Totals]) -> Totals:
    counts = [field.name for field in fields(Totals) if field.name != "steps"]
    return Totals(
        **{name: sum(getattr(part, name) for part in parts) for name in counts},
        steps=_by_name(step for part in parts for step in part.steps),
    )


def _training(plan: TrialPlan) -> Step:
    """The update, and the whole student that it may leave."""
    config, inputs = plan.config, plan.inputs
    if config.method == "laten":
        return translate_step(config, inputs, plan.teacher, plan.student)
    first = plan.first if isinstance(plan.first, int) else 0
    trained = trained_parameters(config, inputs, plan.layers)
    step = train_step(config, inputs, plan.teacher, plan.student, first=first, trained=trained)
    return replace(step, disk=plan.whole * plan.student.weights * BYTES[config.dtype])


def _by_name(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Stages of the same name as one: work and files add up, the largest actor counts."""
    found: dict[str, Step] = {}
    for step in steps:
        held = found.setdefault(step.name, replace(step, operations=0.0, disk=0))
        found[step.name] = Step(
            step.name,
            held.operations + step.operations,
            held.disk + step.disk,
            max(held.memory, step.memory),
            max(held.actors, step.actors),
            max(held.gpus, step.gpus),
        )
    return tuple(found.values())


def rows(plan: SweepPlan) -> tuple[list[str], list[list[str]]]:
    """The plan as a table, header and rows: the sweep, and its trials one by one."""
    most, work = ("" if sure else "≤ " for sure in (plan.exact, plan.decided))
    sides = plan.once, plan.naive

    def row(name: str, show: Callable[[Totals], str]) -> list[str]:
        return [name, *map(show, sides)]

    return [
        f"{plan.trials} trials: {plan.settings} settings, {plan.seeds} seed(s)",
        "sweep",
        "one by one",
    ], [
        row("attributions", lambda side: f"{side.attributions:,}"),
        row("teacher extractions", lambda side: f"{side.extractions:,}"),
        row("columns (teacher layer, interface)", lambda side: f"{most}{side.columns:,}"),
        row("prefixes (student layer)", lambda side: f"{most}{side.prefixes:,}"),
        row("maps", lambda side: f"{side.maps:,}"),
        row("trainings", lambda side: f"{most}{side.trainings:,}"),
        row("engines started", lambda side: f"{most}{side.engines:,}"),
        row("items answered", lambda side: f"{most}{side.items:,}"),
        row("bytes of activation stores", lambda side: f"{most}{side.stored:,}"),
        row("bytes of maps and students, about", lambda side: f"{side.disk - side.stored:,}"),
        row("operations", lambda side: f"{work}{side.operations:.2e}"),
        row(
            f"GPU-hours at {RATE / 1e12:.0f} TFLOP/s",
            lambda side: f"{work}{side.operations / RATE / 3600:.3g}",
        ),
        [f"largest actor ({plan.peak.name})", f"{work}{plan.peak.memory / 1e9:.2f} GB", ""],
    ]


def method_rows(plan: SweepPlan, axis: str) -> tuple[list[str], list[list[str]]]:
    """What one transfer of each value of an axis takes, its evaluation aside: header and rows. Of
    several teachers or tasks, under the first.
    """
    first: dict[str, TrialPlan] = {}
    for trial in plan.plans:
        if axis in trial.trial.axes:
            first.setdefault(str(trial.trial.axes[axis]), trial)
    head = [axis, "trained", "disk", "GPU-hours", "largest actor"]
    body = []
    for name, own in first.items():
        whole = _totals([own], (own.config, [own.config.student]))
        steps = [step for step in whole.steps if step.name != "evaluate"]
        largest = max(steps, key=lambda step: step.memory)
        body.append(
            [
                name,
                f"{trained_parameters(own.config, own.inputs, own.layers):,}",
                f"{sum(step.disk for step in steps) / 1e9:.3g} GB",
                f"{sum(step.operations for step in steps) / RATE / 3600:.3g}",
                f"{largest.memory / 1e9:.1f} GB ({largest.name})",
            ]
        )
    return head, body
