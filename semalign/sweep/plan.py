"""What a sweep will do and cost, without loading a weight: all trials together, and one by one.

A trial's recipe lists what it makes; what has the same key is made once. Where attribution has yet
to decide the pairs every figure is the largest over all that it may find (see sweep/outcomes.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from semalign.artifacts.artifact import Artifact, Cost
from semalign.config.jobs import Config
from semalign.data.root import data_root
from semalign.methods.method import Transfer
from semalign.models.speed import GPU
from semalign.plan import (
    Step,
    artifact_step,
    evaluation_step,
    merged,
    recipe_steps,
    result_bytes,
    scoring_step,
)
from semalign.stages.attribution import LayerScores
from semalign.stages.extraction import Activations, Prefix
from semalign.stages.judged import evaluated_items
from semalign.stages.mapping import Map
from semalign.sweep.outcomes import Count
from semalign.sweep.sharing import Need, SharedResult, Sharing
from semalign.sweep.transfers import transfers as read_transfers
from semalign.sweep.trials import Trial, every_trials, references


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What is done, and its stages: `items` are requests answered."""

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
        stores = (Activations.stage, Prefix.stage)
        return sum(step.cost.disk for step in self.steps if step.stage in stores)

    @property
    def disk(self) -> int:
        """With bases, maps, factors, and students that are whole models: about."""
        return sum(step.cost.disk for step in self.steps)

    @property
    def operations(self) -> float:
        return sum(step.cost.operations for step in self.steps)


@dataclass(frozen=True, kw_only=True)
class SharedArtifact:
    """An artifact, with all parts that may be needed, and the ids of the trials that share it.

    `count` is the number of its parts (1 where it has none) that are needed; `naive` how many the
    trials would make one by one.
    """

    artifact: Artifact
    trials: tuple[str, ...]
    count: Count
    naive: int
    step: Step


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The sweep, `once`, and its trials one by one, `naive`: each a transfer from a clean state.

    `exact`: columns, trainings and bytes are what the run's will be, and no upper bounds.
    `decided`: all pairs are known, so that operations and memory are no upper bounds either.
    `chooses`: only the base and the setting that is chosen are scored on the report split, here
    taken for two settings.
    """

    trials: tuple[Trial, ...]
    transfers: Mapping[str, Transfer]
    shared: tuple[SharedArtifact, ...]
    once: Totals
    naive: Totals
    exact: bool
    decided: bool
    chooses: bool

    @property
    def settings(self) -> int:
        return len({trial.setting for trial in self.trials})

    @property
    def seeds(self) -> int:
        return len({trial.seed for trial in self.trials})

    @property
    def absent(self) -> tuple[str, ...]:
        """Models whose published shape stands in for them."""
        inputs = [self.transfers[trial.id].inputs for trial in self.trials]
        return tuple(dict.fromkeys(path for own in inputs for path in own.absent))

    @property
    def peak(self) -> Step:
        """The stage with the largest actor."""
        return max(self.once.steps, key=lambda step: step.memory)

    def of_stage(self, stage: str) -> tuple[SharedArtifact, ...]:
        return tuple(shared for shared in self.shared if shared.artifact.stage == stage)


def plan_sweep(
    trials: Sequence[Trial],
    transfers: Mapping[str, Transfer] | None = None,
    *,
    compared: bool = False,
    held_back: str | None = None,
) -> SweepPlan:
    """Plan all trials together: `compared` where their sweep chooses nothing, `held_back` is the
    split on which only what it shows is scored. The trials' transfers by id are read unless given.

    Raises UserError for whatever a trial's inputs lack.
    """
    if transfers is None:
        transfers = read_transfers(trials, planned=True)
    sharing = Sharing({trial.id: transfers[trial.id] for trial in trials})
    config = trials[0].config  # of whose runtime settings all trials are
    shared = tuple(_shared(config, need) for need in sharing.needs)
    results = [(r, made.most) for alike, made in sharing.alike for r in alike]
    items = _Items(held_back)
    return SweepPlan(
        trials=tuple(trials),
        transfers=transfers,
        shared=shared,
        once=_once(sharing, shared, results, references(trials, compared=compared), items, trials),
        naive=_naive(sharing, items),
        exact=sharing.exact,
        decided=sharing.decided,
        chooses=held_back is not None,
    )


def _shared(config: Config, need: Need) -> SharedArtifact:
    artifact, count = need.artifact, need.count
    parts = sorted(artifact.parts)[-count.most :]  # those that cost most
    step = artifact_step(config, artifact.restricted(frozenset(parts)))
    return SharedArtifact(
        artifact=artifact,
        trials=tuple(name for group in need.groups for name in group.trials),
        count=count,
        naive=sum(len(group.trials) * group.parts(artifact.stage) for group in need.groups),
        step=step,
    )


class _Items:
    """How many requests one model answers by a configuration, counted once. On the split that is
    `held_back` not every trial is scored; None: all are scored on all.
    """

    def __init__(self, held_back: str | None) -> None:
        self.held_back = held_back
        self._known: dict[tuple[str, str], int] = {}

    def of_trial(self, config: Config) -> int:
        return self(every_trials(config, self.held_back))

    def shown(self, config: Config) -> int:
        return self(config) - self.of_trial(config)

    def __call__(self, config: Config) -> int:
        settings = config.evaluation
        root = settings.root or config.data.root
        key = settings.model_dump_json(), root
        if key not in self._known:
            self._known[key] = evaluated_items(settings, data_root(root))
        return self._known[key]


def _once(
    sharing: Sharing,
    shared: Sequence[SharedArtifact],
    results: Sequence[tuple[SharedResult, int]],
    scored: tuple[Config, Sequence[str]],
    items: _Items,
    trials: Sequence[Trial],
) -> Totals:
    """`results`: each with the number of times that it is made, at most, with other pairs.
    `scored`: the models that they are compared with, and the settings by which they are scored.
    """
    transfers = [t for group in sharing.groups.values() for t in group.trials.values()]
    both = [model for t in transfers for model in (t.inputs.teacher, t.inputs.student)]
    models = {model.path: model for model in both}
    config, names = scored
    alone = [models[name] for name in dict.fromkeys(names)]
    answers = [(items(config), model.shape.weights) for model in alone]
    answers += [
        (items.of_trial(r.transfer.config) * times, r.transfer.inputs.student.shape.weights)
        for r, times in results
    ]
    seeds = len({trial.seed for trial in trials})
    shown = seeds * min(2, len({trial.setting for trial in trials}))  # the base and the chosen
    answers.append((shown * items.shown(config), transfers[0].inputs.student.shape.weights))
    scoring = scoring_step(
        transfers[0],
        answered=float(sum(count * weights for count, weights in answers)),
        largest=max(
            *(model.bytes for model in alone), *(result_bytes(r.transfer) for r, _ in results)
        ),
    )
    served = {model.path for model in alone} | {t.inputs.student.path for t in transfers}
    engines = len(served) + sum(times for result, times in results if result.whole)
    made = [_times(_result_step(r.transfer, r.artifact, r.cost), times) for r, times in results]
    return Totals(
        attributions=sharing.number(LayerScores.stage),
        extractions=sum(need.artifact.stage == Activations.stage for need in shared),
        columns=sharing.number(Activations.stage),
        prefixes=sharing.number(Prefix.stage),
        maps=sharing.number(Map.stage),
        trainings=sharing.trainings,
        engines=engines * config.evaluation.num_engines,
        items=sum(count for count, _ in answers),
        steps=merged([*(need.step for need in shared), *made, scoring]),
    )


def _naive(sharing: Sharing, items: _Items) -> Totals:
    counts: Counter[str] = Counter()
    steps: list[Step] = []
    for group in sharing.groups.values():
        number = len(group.trials)
        for stage in (LayerScores.stage, Activations.stage, Prefix.stage, Map.stage):
            counts[stage] += number * group.parts(stage)
        counts["stores"] += number * (group.parts(Activations.stage) > 0)
        steps += [_times(step, number) for step in group.before]
        for transfer, result, cost in zip(
            group.trials.values(), group.artifacts, group.costs, strict=True
        ):
            config = transfer.config
            whole = transfer.method.rank(config) is None
            models = len({config.student, config.teacher})
            counts["engines"] += (models + whole) * config.evaluation.num_engines
            counts["items"] += (models + 1) * items(config)
            steps.append(_result_step(transfer, result, cost))
            steps.append(evaluation_step(transfer, items(config)))
    return Totals(
        attributions=counts[LayerScores.stage],
        extractions=counts["stores"],
        columns=counts[Activations.stage],
        prefixes=counts[Prefix.stage],
        maps=counts[Map.stage],
        trainings=sum(len(group.trials) for group in sharing.groups.values()),
        engines=counts["engines"],
        items=counts["items"],
        steps=merged(steps),
    )


def _result_step(transfer: Transfer, result: Artifact, cost: Cost) -> Step:
    return replace(artifact_step(transfer.config, result), cost=cost)


def _times(step: Step, number: int) -> Step:
    cost = step.cost
    work, disk = cost.operations * number, cost.disk * number
    return replace(step, cost=replace(cost, operations=work, disk=disk))


def sweep_rows(plan: SweepPlan) -> tuple[list[str], list[list[str]]]:
    """The plan as a table, header and rows: the sweep, and its trials one by one."""
    most, work = ("" if sure else "≤ " for sure in (plan.exact, plan.decided))
    chosen = "≤ " if plan.chooses else ""
    sides = plan.once, plan.naive

    def row(name: str, show: Callable[[Totals], str]) -> list[str]:
        return [name, *map(show, sides)]

    return [
        f"{len(plan.trials)} trials: {plan.settings} settings, {plan.seeds} seed(s)",
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
        row("items answered", lambda side: f"{chosen or most}{side.items:,}"),
        row("bytes of activation stores", lambda side: f"{most}{side.stored:,}"),
        row(
            "bytes of bases, maps, factors and students, about",
            lambda side: f"{side.disk - side.stored:,}",
        ),
        row("operations", lambda side: f"{work}{side.operations:.2e}"),
        row(
            f"GPU-hours at {GPU / 1e12:.0f} TFLOP/s",
            lambda side: f"{work}{side.operations / GPU / 3600:.3g}",
        ),
        [f"largest actor ({plan.peak.stage})", f"{work}{plan.peak.memory / 1e9:.2f} GB", ""],
    ]


def method_rows(plan: SweepPlan, axis: str) -> tuple[list[str], list[list[str]]]:
    """What one transfer of each value of an axis takes, its evaluation aside: header and rows. Of
    several teachers or tasks, under the first.
    """
    first: dict[str, Transfer] = {}
    for trial in plan.trials:
        if axis in trial.axes:
            first.setdefault(str(trial.axes[axis]), plan.transfers[trial.id])
    head = [axis, "trained", "disk", "GPU-hours", "largest actor"]
    body = []
    for name, transfer in first.items():
        recipes = list(transfer.possible())
        steps = recipe_steps(transfer.config, recipes)
        largest = max(steps, key=lambda step: step.memory)
        body.append(
            [
                name,
                f"{max(recipe.result.trained_parameters for recipe in recipes):,}",
                f"{sum(step.cost.disk for step in steps) / 1e9:.3g} GB",
                f"{sum(step.cost.operations for step in steps) / GPU / 3600:.3g}",
                f"{largest.memory / 1e9:.1f} GB ({largest.stage})",
            ]
        )
    return head, body
