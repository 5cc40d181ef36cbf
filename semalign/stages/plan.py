"""What a transfer will cost, from configurations alone: bytes, memory, operations."""

from __future__ import annotations

from dataclasses import dataclass

from semalign.config.jobs import Config
from semalign.core.pairing import Pair, pair_layers
from semalign.stages.costs import (
    Shape,
    Step,
    align_step,
    attribute_step,
    evaluate_step,
    evaluated_items,
    extract_step,
    length,
    prefix_step,
    served_bytes,
    shape_of,
    stored_rows,
    train_step,
)
from semalign.stages.inputs import Inputs
from semalign.stages.method_costs import seek_step, trained_parameters, translate_step
from semalign.stages.supervision import teacher_columns

INDEPENDENT = ("explicit", "last", "random")  # strategies that do not look at the attribution


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`pairs` that are known are final; otherwise the steps are upper bounds over the layers
    possible. `absent` models have their published shape; `trained` parameters.
    """

    teacher: Shape
    student: Shape
    pairs: tuple[Pair, ...] | None
    absent: tuple[str, ...]
    overlap: float
    examples: int
    tokens: int
    positions: int
    trained: int
    steps: tuple[Step, ...]


def make_plan(config: Config, inputs: Inputs, pairs: tuple[Pair, ...] | None) -> Plan:
    """Predict each stage. `pairs` is None while attribution has not run and decides them: then
    the stages are upper bounds over the layers possible.
    """
    teacher, student = shape_of(inputs.teacher), shape_of(inputs.student)
    if config.pairs_layers:
        layers = len({pair.student for pair in pairs}) if pairs else config.attribution.top_n
        prepare = _paired(config, inputs, teacher, student, pairs)
        first = min(pair.student for pair in pairs) if pairs else 0
    else:
        layers, first = student.layers, 0
        prepare = [seek_step(config, inputs, teacher)] if config.method == "seeking" else []
    trained = trained_parameters(config, inputs, layers)
    if config.method == "laten":
        update = translate_step(config, inputs, teacher, student)
    else:
        update = train_step(config, inputs, teacher, student, first=first, trained=trained)
    weights = 2 * student.weights + teacher.weights
    return Plan(
        teacher=teacher,
        student=student,
        pairs=pairs,
        absent=inputs.absent,
        overlap=inputs.overlap.fraction,
        examples=len(inputs.train),
        tokens=length(inputs.train),
        positions=sum(stored_rows(inputs.train, config.extraction.positions)),
        trained=trained,
        steps=(
            *prepare,
            update,
            evaluate_step(
                config,
                inputs,
                asked=float(weights * evaluated_items(config)),
                largest=max(
                    served_bytes(config, teacher), served_bytes(config, student, transferred=True)
                ),
            ),
        ),
    )


def _paired(
    config: Config,
    inputs: Inputs,
    teacher: Shape,
    student: Shape,
    pairs: tuple[Pair, ...] | None,
) -> list[Step]:
    """What comes before the update of paired layers."""
    known = teacher_columns(
        pairs or (),
        config.loss,
        config.interfaces,
        num_layers=teacher.layers,
        extra_layers=inputs.extra_layers,
    )
    undecided = pairs is None and config.loss.alpha > 0
    # an interpolated pair has two teacher layers
    possible = 2 * config.attribution.top_n * len(config.interfaces) if undecided else 0
    columns = len(known) + possible
    deepest = teacher.layers if undecided else max((c.layer + 1 for c in known), default=0)
    first = min(pair.student for pair in pairs) if pairs else 0
    return [
        attribute_step(config, inputs, teacher),
        extract_step(config, inputs, teacher, columns=columns, layers=deepest),
        prefix_step(config, inputs, student, layers=first + 1 if pairs else student.layers),
        align_step(config, inputs, teacher, student),
    ]


def known_pairs(config: Config, inputs: Inputs) -> tuple[Pair, ...] | None:
    """The pairs, if they can be told without attributing; none where the method has none."""
    if not config.pairs_layers:
        return ()
    if config.pairing.strategy not in INDEPENDENT:
        return None
    return tuple(
        pair_layers(
            config.pairing.strategy,
            num_teacher_layers=inputs.teacher.num_hidden_layers,
            num_student_layers=inputs.student.num_hidden_layers,
            critical=list(range(config.attribution.top_n)),  # `random` asks how many, not which
            seed=config.seed,
            explicit=list(config.pairing.explicit or ()),
        )
    )
