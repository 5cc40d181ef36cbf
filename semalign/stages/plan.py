"""What a transfer will cost, from configurations alone: bytes, memory, operations."""

from __future__ import annotations

from dataclasses import dataclass

from semalign.config import Config
from semalign.core.pairing import Pair, pair_layers
from semalign.stages.align import teacher_columns
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
    shape_of,
    stored_rows,
    train_step,
)
from semalign.stages.inputs import Inputs

INDEPENDENT = ("explicit", "last", "random")  # strategies that do not look at the attribution


@dataclass(frozen=True)
class Plan:
    """`known` pairs are final; otherwise the steps are upper bounds over the layers possible."""

    teacher: Shape
    student: Shape
    pairs: tuple[Pair, ...] | None
    overlap: float
    examples: int
    tokens: int
    positions: int
    steps: tuple[Step, ...]


def make_plan(config: Config, inputs: Inputs, pairs: tuple[Pair, ...] | None) -> Plan:
    """Predict each stage. `pairs` is None while attribution has not run and decides them: then
    the stages are upper bounds over the layers possible.
    """
    teacher, student = shape_of(inputs.teacher), shape_of(inputs.student)
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
    weights = 2 * student.weights + teacher.weights
    largest = max(teacher.weights, student.weights)
    items = evaluated_items(config)
    return Plan(
        teacher,
        student,
        pairs,
        inputs.overlap.fraction,
        len(inputs.train),
        length(inputs.train),
        sum(stored_rows(inputs.train, config.extraction.positions)),
        (
            attribute_step(config, inputs, teacher),
            extract_step(config, inputs, teacher, columns=columns, layers=deepest),
            prefix_step(config, inputs, student, layers=first + 1 if pairs else student.layers),
            align_step(config, inputs, teacher, student),
            train_step(config, inputs, student, first=first),
            evaluate_step(config, inputs, items=items, weights=weights, largest=largest),
        ),
    )


def known_pairs(config: Config, inputs: Inputs) -> tuple[Pair, ...] | None:
    """The pairs, if they can be told without attributing."""
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
