"""What a transfer does and costs, from the costs of its artifacts; no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from semalign.artifacts.artifact import Artifact, Cost, Workspace
from semalign.config.jobs import Config
from semalign.config.sections import Evaluation
from semalign.core.pairing import Pair
from semalign.data.root import data_root
from semalign.files import bytes_text
from semalign.methods.method import Recipe, Transfer
from semalign.models.memory import ENGINE, PROCESS
from semalign.models.shapes import BYTES
from semalign.models.speed import GPU, duration_text, operations_per_second
from semalign.stages.judged import Records, engine_bytes, evaluated_items, evaluation_cost


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage: what it costs in all, the memory of one of its actors, and how many it has.

    `cached`: its artifacts are there.
    """

    stage: str
    cost: Cost
    actors: int = 1
    gpus: float = 0.0
    cached: bool = False
    process: int = PROCESS

    @property
    def memory(self) -> int:
        """Peak bytes of an actor: of its GPUs where it has some, else resident ones of its
        process, imports included.
        """
        return self.cost.memory + (0 if self.gpus or self.cached else self.process)

    def seconds(self, rate: float) -> float:
        """Estimated, at so many operations a second of each actor."""
        return self.cost.operations / rate / self.actors


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A transfer's stages; where `pairs` is None attribution has yet to decide them, and every
    figure is the largest over all pairs that it may find.
    """

    transfer: Transfer
    pairs: tuple[Pair, ...] | None
    trained: int
    steps: tuple[Step, ...]

    @property
    def operations(self) -> float:
        return sum(step.cost.operations for step in self.steps)

    @property
    def disk(self) -> int:
        return sum(step.cost.disk for step in self.steps)


def plan_transfer(transfer: Transfer, workspace: Workspace) -> Plan:
    """What is missing in the work folder, and what it costs."""
    known = transfer.known(workspace)
    recipes = [transfer.recipe(workspace)] if known else list(transfer.possible())
    config, settings = transfer.config, transfer.config.evaluation
    items = evaluated_items(settings, data_root(settings.root or config.data.root))
    return Plan(
        transfer=transfer,
        pairs=recipes[0].pairs if known else None,
        trained=max(recipe.result.trained_parameters for recipe in recipes),
        steps=(
            *recipe_steps(config, recipes, workspace),
            evaluation_step(transfer, items),
        ),
    )


def recipe_steps(
    config: Config, recipes: Sequence[Recipe], workspace: Workspace | None = None
) -> tuple[Step, ...]:
    """The stages of a recipe; of several possible ones the dearest of each stage.

    What is in the work folder costs nothing. Of several recipes a store that is made part by part
    counts as missing: which parts are needed is not known.
    """
    known: dict[str, bool] = {}

    def cached(artifact: Artifact) -> bool:
        if workspace is None or (artifact.in_place and len(recipes) > 1):
            return False
        if artifact.key not in known:
            known[artifact.key] = workspace.has(artifact)
        return known[artifact.key]

    found: dict[str, list[Step]] = {}
    for recipe in recipes:
        for step in merged(artifact_step(config, a, cached=cached(a)) for a in recipe.artifacts):
            found.setdefault(step.stage, []).append(step)
    return tuple(map(_dearest, found.values()))


def artifact_step(config: Config, artifact: Artifact, *, cached: bool = False) -> Step:
    """One artifact as a stage, with the actors that the settings give to those of its kind: of the
    extraction where models are in memory, of the training where parameters are trained.
    """
    extraction, training = config.extraction, config.training
    actors, gpus = 1, 0.0
    if artifact.in_place:
        actors, gpus = extraction.num_actors, extraction.num_gpus
    elif artifact.models:
        gpus = extraction.num_gpus
    elif artifact.trained_parameters:
        actors, gpus = training.num_workers, float(training.use_gpu)
    cost = Cost() if cached else artifact.cost()
    return Step(stage=artifact.stage, cost=cost, actors=actors, gpus=gpus, cached=cached)


def evaluation_step(transfer: Transfer, items: int) -> Step:
    """Scoring the teacher, the student and what comes out, each by so many items."""
    inputs = transfer.inputs
    own = inputs.teacher, inputs.student
    weights = sum(model.shape.weights for model in own) + inputs.student.shape.weights
    return scoring_step(
        transfer,
        answered=float(weights * items),
        largest=max(result_bytes(transfer), *(model.bytes for model in own)),
    )


def scoring_step(transfer: Transfer, *, answered: float, largest: int) -> Step:
    """`answered`: requests times the weights of the model that answers, over all that are scored;
    `largest`: bytes of the weights of one.

    Estimated from the mean length of the transfer's training rows: answers are not known yet.
    """
    settings, train = transfer.config.evaluation, transfer.inputs.train
    return Step(
        stage=Records.stage,
        cost=evaluation_cost(
            settings,
            answered=answered,
            mean_length=train.length / max(1, len(train)),
            largest=largest,
        ),
        actors=settings.num_engines,
        gpus=settings.num_gpus * settings.tensor_parallel_size,
        process=ENGINE,
    )


def engine_step(settings: Evaluation, records: Records, *, cached: bool) -> Step:
    """A candidate's answers to a split, by the engines of the settings."""
    cost = records.cost()
    return Step(
        stage=Records.stage,
        cost=Cost() if cached else replace(cost, memory=engine_bytes(cost.memory, settings)),
        actors=settings.num_engines,
        gpus=settings.num_gpus * settings.tensor_parallel_size,
        cached=cached,
        process=ENGINE,
    )


def result_bytes(transfer: Transfer) -> int:
    """Of the transferred student's weights where it is scored."""
    return transfer.inputs.student.shape.weights * BYTES[transfer.method.dtype(transfer.config)]


def merged(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Steps of the same stage as one: operations and files add up, the largest actor counts."""
    found: dict[str, list[Step]] = {}
    for step in steps:
        found.setdefault(step.stage, []).append(step)
    return tuple(map(_joined, found.values()))


def _joined(steps: Sequence[Step]) -> Step:
    cost = Cost(
        operations=sum(step.cost.operations for step in steps),
        disk=sum(step.cost.disk for step in steps),
        memory=max(step.cost.memory for step in steps),
    )
    return replace(_largest(steps), cost=cost)


def _dearest(steps: Sequence[Step]) -> Step:
    return replace(_largest(steps), cost=dearest_cost(step.cost for step in steps))


def _largest(steps: Sequence[Step]) -> Step:
    return replace(
        steps[0],
        actors=max(step.actors for step in steps),
        gpus=max(step.gpus for step in steps),
        cached=all(step.cached for step in steps),
    )


def dearest_cost(costs: Iterable[Cost]) -> Cost:
    """The largest of each figure."""
    costs = list(costs)
    return Cost(
        operations=max(cost.operations for cost in costs),
        disk=max(cost.disk for cost in costs),
        memory=max(cost.memory for cost in costs),
    )


TIME_NOTE = (
    "times are estimates: operations, at the speed at which this machine multiplied matrices in a "
    f"second (a GPU that is not here: {GPU / 1e12:.0f} TFLOP/s); loading and starting come on top"
)


def rates(plan: Plan) -> dict[bool, float]:
    """Operations a second on CPUs (False) and GPUs (True), whichever the plan's stages run on;
    measured here.
    """
    config, width = plan.transfer.config, plan.transfer.inputs.teacher.width
    return {
        on_gpu: operations_per_second(config.dtype, width, "cuda" if on_gpu else "cpu")
        for on_gpu in {step.gpus > 0 for step in plan.steps}
    }


def plan_rows(plan: Plan, rates: Mapping[bool, float]) -> tuple[list[str], list[list[str]]]:
    """The stages as a table: header and rows; `rates` are operations a second on CPUs and GPUs."""
    total = plan.operations
    seconds = [step.seconds(rates[step.gpus > 0]) for step in plan.steps]
    body = [
        [
            step.stage,
            f"{step.cost.operations:.2e}" if not step.cached else "cached",
            f"{step.cost.operations / total:.1%}" if not step.cached else "",
            bytes_text(step.cost.disk) if step.cost.disk else "",
            bytes_text(step.memory) if not step.cached else "",
            f"~ {duration_text(taken)}" if not step.cached else "",
            str(step.actors),
            f"{step.gpus:g}",
        ]
        for step, taken in zip(plan.steps, seconds, strict=True)
    ]
    whole = f"~ {duration_text(sum(seconds))}"
    body.append(["total", f"{total:.2e}", "", bytes_text(plan.disk), "", whole, "", ""])
    head = ["stage", "operations", "share", "disk", "memory / actor", "time", "actors",
            "GPUs / actor"]  # fmt: skip
    return head, body
