"""What a transfer will cost, from configurations alone: bytes, memory, operations.

Counts: a token's forward pass costs 2 operations a weight it meets; a backward pass to activations
as much again, and to weights as much again where they are trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from semalign.config import Config
from semalign.core.pairing import Pair
from semalign.models.layers import find_decoder
from semalign.stages.data import Tokens, data_root
from semalign.stages.inputs import Inputs
from semalign.tasks import load_split

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """Weights of a model: one layer, all layers, embedding, LM head."""

    layers: int
    width: int
    vocabulary: int
    per_layer: int
    embedding: int
    head: int

    @property
    def weights(self) -> int:
        return self.layers * self.per_layer + self.embedding + self.head


def shape_of(config: Any) -> Shape:
    """Counted on a model without storage, so any architecture and size takes under a second."""
    with torch.device("meta"):
        decoder = find_decoder(AutoModelForCausalLM.from_config(config))
    head = decoder.lm_head.weight
    return Shape(
        layers=len(decoder.layers),
        width=head.shape[1],
        vocabulary=head.shape[0],
        per_layer=sum(p.numel() for p in decoder.layers[0].parameters()),
        embedding=0 if config.tie_word_embeddings else head.numel(),
        head=head.numel(),
    )


@dataclass(frozen=True)
class Step:
    """One stage: floating-point operations, bytes it leaves on disk, peak memory of one actor."""

    name: str
    operations: float
    disk: int
    memory: int
    actors: int
    gpus: float


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
    """Predict each stage. `pairs` is None while attribution has not run and decides them."""
    teacher, student = shape_of(inputs.teacher), shape_of(inputs.student)
    tokens = _length(inputs.train)
    positions = sum(_width(e.align_positions(config.extraction.positions)) for e in inputs.train)
    supervised = sum(_width(e.supervised_positions) for e in inputs.train)
    attributed = _length(inputs.attribution_teacher)
    teacher_layers = {layer for pair in pairs or () for layer in pair.teacher}
    stored = teacher_layers | set(inputs.extra_layers)
    columns = (len(stored) if pairs else config.attribution.top_n * 2 + len(stored)) * len(
        config.interfaces
    )
    deepest = max(stored) + 1 if pairs else teacher.layers
    first = min(pair.student for pair in pairs) if pairs else 0
    prefix = first + 1 if pairs else student.layers
    size = BYTES[config.dtype]
    extraction, training, evaluation = config.extraction, config.training, config.evaluation
    longest = max(len(example.ids) for example in inputs.train)
    tail = (student.layers - first) * student.per_layer
    activations = longest * config.attribution.batch_size * teacher.width * teacher.layers * 12
    trained = training.micro_batch_size * longest * student.width * (student.layers - first) * 16
    logits = training.micro_batch_size * longest * student.vocabulary * 4
    steps = (
        Step(
            "attribute",
            4.0 * teacher.weights * attributed,
            0,
            teacher.weights * size + activations * size,
            1,
            extraction.num_gpus,
        ),
        Step(
            "extract",
            2.0 * deepest * teacher.per_layer * tokens,
            columns * positions * teacher.width * BYTES[extraction.dtype],
            (deepest * teacher.per_layer + teacher.embedding) * size
            + extraction.shard_examples * longest * teacher.width * 2 * columns,
            extraction.num_actors,
            extraction.num_gpus,
        ),
        Step(
            "prefix",
            2.0 * prefix * student.per_layer * tokens,
            tokens * student.width * size,
            (prefix * student.per_layer + student.embedding) * size,
            extraction.num_actors,
            extraction.num_gpus,
        ),
        Step(
            "align",
            2.0
            * len(inputs.overlap.student_ids)
            * (teacher.width**2 + student.width**2 + teacher.width * student.width),
            student.width * teacher.width * 4,
            8 * len(inputs.overlap.student_ids) * (teacher.width + student.width) * 2,
            1,
            0,
        ),
        Step(
            "train",
            config.epochs * (4.0 * tail * tokens + 4.0 * student.head * supervised),
            0,
            (tail + student.head) * size + trained * size + logits * 3,
            training.num_workers,
            float(training.use_gpu),
        ),
        Step(
            "evaluate",
            2.0 * (2 * student.weights + teacher.weights) * _evaluated_tokens(config, inputs),
            0,
            max(teacher.weights, student.weights) * size + int(evaluation.kv_cache_gb * 2**30),
            evaluation.num_engines,
            evaluation.num_gpus * evaluation.tensor_parallel_size,
        ),
    )
    return Plan(
        teacher,
        student,
        pairs,
        inputs.overlap.fraction,
        len(inputs.train),
        tokens,
        positions,
        steps,
    )


def _evaluated_tokens(config: Config, inputs: Inputs) -> int:
    """Items times the training set's mean length: an estimate, answers are not known yet."""
    mean = math.ceil(_length(inputs.train) / len(inputs.train))
    root = data_root(config.evaluation.root or config.data.root)
    items = sum(
        len(load_split(root, task, split))
        for task in config.evaluation.tasks
        for split in config.evaluation.splits
    )
    return items * mean


def _length(tokens: list[Tokens]) -> int:
    return sum(len(example.ids) for example in tokens)


def _width(where: slice) -> int:
    return int(where.stop - where.start)
