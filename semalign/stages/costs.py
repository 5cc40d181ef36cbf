"""What one stage of a transfer costs: bytes, memory, operations, from configurations alone.

Counts: a token's forward pass costs 2 operations a weight it meets; a backward pass to activations
as much again, and to weights as much again where they are trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from semalign.config.jobs import Config
from semalign.data.root import data_root
from semalign.data.tokens import Tokens
from semalign.models.decoder import find_decoder
from semalign.models.shapes import skeleton
from semalign.stages.inputs import Inputs
from semalign.stages.scoring import chosen_protocol
from semalign.tasks import load_split

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


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
    decoder = find_decoder(skeleton(config))
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


def attribute_step(config: Config, inputs: Inputs, teacher: Shape) -> Step:
    """One forward and backward pass of the teacher over the attribution split."""
    longest = max(len(example.ids) for example in inputs.train)
    activations = longest * config.attribution.batch_size * teacher.width * teacher.layers * 12
    return Step(
        "attribute",
        4.0 * teacher.weights * length(inputs.attribution_teacher),
        0,
        (teacher.weights + activations) * BYTES[config.dtype],
        1,
        config.extraction.num_gpus,
    )


def similarity_step(config: Config, inputs: Inputs, teacher: Shape, student: Shape) -> Step:
    """CKA of all layers: a forward pass of both models over the attribution split."""
    weights = teacher.weights + student.weights
    return Step(
        "similarity",
        2.0 * weights * length(inputs.attribution_teacher),
        0,
        weights * BYTES[config.dtype],
        1,
        config.extraction.num_gpus,
    )


def extract_step(
    config: Config, inputs: Inputs, teacher: Shape, *, columns: int, layers: int
) -> Step:
    """The teacher's first `layers` layers, of which `columns` sublayer outputs are stored."""
    extraction = config.extraction
    longest = max(len(example.ids) for example in inputs.train)
    rows = stored_rows(inputs.train, extraction.positions)
    return Step(
        "extract",
        2.0 * layers * teacher.per_layer * length(inputs.train),
        columns * column_bytes(rows, extraction.shard_examples, teacher.width, extraction.dtype),
        (layers * teacher.per_layer + teacher.embedding) * BYTES[config.dtype]
        + extraction.shard_examples * longest * teacher.width * 2 * columns,
        extraction.num_actors,
        extraction.num_gpus,
    )


def prefix_step(
    config: Config, inputs: Inputs, student: Shape, *, layers: int, columns: int = 1
) -> Step:
    """The student's first `layers` layers; the inputs of `columns` of them are stored."""
    extraction = config.extraction
    rows = stored_rows(inputs.train, "all")
    return Step(
        "prefix",
        2.0 * layers * student.per_layer * length(inputs.train),
        columns * column_bytes(rows, extraction.shard_examples, student.width, config.dtype),
        (layers * student.per_layer + student.embedding) * BYTES[config.dtype],
        extraction.num_actors,
        extraction.num_gpus,
    )


def align_step(config: Config, inputs: Inputs, teacher: Shape, student: Shape) -> Step:
    """Both semantic bases and the map between them, which with `top_k` is both bases."""
    shared = len(inputs.overlap.student_ids)
    bases = shared * (teacher.width + student.width)
    matrix = student.width * teacher.width
    return Step(
        "align",
        2.0 * shared * (teacher.width**2 + student.width**2 + teacher.width * student.width),
        4 * (matrix if config.alignment.top_k is None else bases),
        8 * bases * 2,
        1,
        0,
    )


def train_step(
    config: Config,
    inputs: Inputs,
    teacher: Shape,
    student: Shape,
    *,
    first: int,
    trained: int = 0,
) -> Step:
    """All epochs over the student's layers from `first` (from 0) on; `trained` parameters."""
    training, loss, size = config.training, config.loss, BYTES[config.dtype]
    longest = max(len(example.ids) for example in inputs.train)
    supervised = sum(_width(example.supervised_positions) for example in inputs.train)
    depth = student.layers - first
    tail = depth * student.per_layer
    activations = training.micro_batch_size * longest * student.width * depth * 16
    logits = training.micro_batch_size * longest * student.vocabulary * 4
    # both models' logits of the aligned rows, made twice, and the gradient to the student's state
    said = (loss.gamma > 0) + (loss.alpha > 0 and loss.objective == "fisher")
    aligned = sum(stored_rows(inputs.train, config.extraction.positions))
    heads = said * aligned * (4.0 * (teacher.head + student.head) + 2.0 * student.head)
    work = 4.0 * tail * length(inputs.train) + 4.0 * student.head * supervised + heads
    return Step(
        "train",
        config.epochs * work,
        0,
        (tail + student.head + loss.uses_teacher_head * teacher.head) * size
        + activations * size
        + logits * 3
        + 16 * trained,
        training.num_workers,
        float(training.use_gpu),
    )


def evaluate_step(config: Config, inputs: Inputs, *, asked: float, largest: int) -> Step:
    """`asked`: items times the weights of the model that answers, over all candidates; `largest`:
    bytes of the weights of one.

    Estimated from the training set's mean length: answers are not known yet.
    """
    evaluation = config.evaluation
    mean = math.ceil(length(inputs.train) / len(inputs.train))
    return Step(
        "evaluate",
        2.0 * asked * mean,
        0,
        largest + int(evaluation.kv_cache_gb * 2**30),
        evaluation.num_engines,
        evaluation.num_gpus * evaluation.tensor_parallel_size,
    )


def served_bytes(config: Config, shape: Shape, *, transferred: bool = False) -> int:
    """Of a model's weights where it answers: what LaTen leaves is run in float32."""
    wide = transferred and config.method == "laten"
    return shape.weights * (4 if wide else BYTES[config.dtype])


def evaluated_items(config: Config) -> int:
    """Prompts that one candidate answers, each as often as it is sampled."""
    protocol, settings = chosen_protocol(config.evaluation), config.evaluation
    root = data_root(settings.root or config.data.root)
    profiles = {task: protocol.profile(task) for task in settings.tasks}
    return sum(
        len(load_split(root, task, split)) * (1 if profile.choices else profile.n)
        for task, profile in profiles.items()
        for split in settings.splits
    )


def stored_rows(tokens: Sequence[Tokens], positions: str) -> list[int]:
    """How many positions of each example are stored."""
    return [_width(example.align_positions(positions)) for example in tokens]


def column_bytes(rows: Sequence[int], shard_examples: int, width: int, dtype: str) -> int:
    """Size on disk of one column of an activation store, to the byte.

    `rows`: positions of each example. A shard is a safetensors file: 8 bytes for the length of its
    header, the header (JSON, padded to 8 bytes), then the numbers.
    """
    total = 0
    for start in range(0, len(rows), shard_examples):
        shape = [sum(rows[start : start + shard_examples]), width]
        size = shape[0] * width * BYTES[dtype]
        tensor = {"dtype": _SAFETENSORS[dtype], "shape": shape, "data_offsets": [0, size]}
        header = len(json.dumps({"rows": tensor}, separators=(",", ":")))
        total += 8 + 8 * math.ceil(header / 8) + size
    return total


def length(tokens: Sequence[Tokens]) -> int:
    """Tokens of a dataset."""
    return sum(len(example.ids) for example in tokens)


def _width(where: slice) -> int:
    return int(where.stop - where.start)
