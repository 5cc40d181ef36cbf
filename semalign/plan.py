"""What a transfer does and costs, from the costs of its artifacts; no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from semalign.artifacts.artifact import Artifact, Cost, Workspace
from semalign.config.jobs import Config
from semalign.core.pairing import Pair
from semalign.data.root import data_root
from semalign.files import bytes_text
from semalign.methods.method import Recipe, Transfer
from semalign.models.shapes import BYTES
from semalign.stages.judged import Records, evaluated_items, evaluation_cost


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


def plan_rows(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """The stages as a table: header and rows."""
    total = plan.operations
    body = [
        [
            step.stage,
            f"{step.cost.operations:.2e}" if not step.cached else "cached",
            f"{step.cost.operations / total:.1%}" if not step.cached else "",
            bytes_text(step.cost.disk) if step.cost.disk else "",
            bytes_text(step.cost.memory) if not step.cached else "",
            str(step.actors),
            f"{step.gpus:g}",
        ]
        for step in plan.steps
    ]
    body.append(["total", f"{total:.2e}", "", bytes_text(plan.disk), "", "", ""])
    head = ["stage", "operations", "share", "disk", "memory / actor", "actors", "GPUs / actor"]
    return head, body
