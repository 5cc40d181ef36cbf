"""What the methods beside SemAlign cost, and how much each trains: from configurations alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from semalign.config.jobs import Config
from semalign.methods.laten.transfer import labelled_rows, neuron_counts, planned_steps
from semalign.models.decoder import find_decoder
from semalign.models.injection import count_trainable, find_modules
from semalign.models.shapes import skeleton
from semalign.stages.costs import BYTES, Shape, Step, length
from semalign.stages.inputs import Inputs

_ADAM = 16  # bytes a trained parameter: itself, its gradient, two moments


def trained_parameters(config: Config, inputs: Inputs, layers: int) -> int:
    """How many parameters are trained, `layers` of the student's in the methods that pair."""
    student = inputs.student
    if config.method == "seeking":
        seeking = config.seeking
        return count_trainable(student, seeking.modules, seeking.rank, layers=seeking.layers)
    if config.method == "laten":
        return hypernetwork_parameters(inputs)
    if config.training.adapter == "full":
        decoder = find_decoder(skeleton(student))
        return layers * sum(p.numel() for p in decoder.layers[0].parameters())
    lora = config.training.lora
    return layers * count_trainable(student, lora.target_modules, lora.rank, layers=1)


def optimizer_bytes(parameters: int) -> int:
    """AdamW's, with the parameters and their gradients in float32."""
    return _ADAM * parameters


def seek_step(config: Config, inputs: Inputs, teacher: Shape) -> Step:
    """Sensitivities of the seed examples, then a window and an SVD for each matrix of the student.

    Memory: the teacher, a float32 sum for every weight of the modules, and one gradient; or, later,
    the float64 table of one matrix beside the first two.
    """
    seeking = config.seeking
    model, student = skeleton(inputs.teacher), skeleton(inputs.student)
    sums = list(_weights(model, find_modules(model, seeking.modules).values()))
    ours = find_modules(student, seeking.modules, layers=seeking.layers)
    sizes = [sorted(weight.shape) for weight in _weights(student, ours.values())]
    largest = max(weight.numel() for weight in sums)
    factors = count_trainable(inputs.student, seeking.modules, seeking.rank, layers=seeking.layers)
    blocks = sum(n * m for n, m in sizes) if seeking.subtract == "block" else 0
    kept = sum(weight.numel() for weight in sums)
    return Step(
        "seek",
        6.0 * teacher.weights * length(inputs.attribution_teacher)
        + sum(6.0 * m * n * n + 20.0 * n**3 for n, m in sizes),
        4 * factors + BYTES[config.dtype] * blocks,
        teacher.weights * BYTES[config.dtype] + 4 * kept + 3 * 8 * largest,
        1,
        config.extraction.num_gpus,
    )


def translate_step(config: Config, inputs: Inputs, teacher: Shape, student: Shape) -> Step:
    """LaTen: both models beside each other, the hypernetwork with its optimiser, and the deltas of
    one example with their gradients; nothing of a delta's full size. Leaves a float32 student.

    Raises UserError for more steps than there are attribution rows.
    """
    steps = planned_steps(config.laten, config.data.task, len(inputs.attribution))
    _, align = labelled_rows(config, inputs.train, inputs.align)
    rows = steps * min(config.laten.pool, 1 + len(align))
    mean = length(align) / max(1, len(align))
    longest = max(len(example.ids) for example in (*align, *inputs.attribution))
    activations = longest * student.width * student.layers * 16 * BYTES[config.dtype]
    weights = teacher.weights + student.weights
    both = weights * BYTES[config.dtype]
    # every neuron's column is read by the LM head, once for all rows
    neurons = sum(
        2.0
        * model.num_hidden_layers
        * model.vocab_size
        * model.hidden_size
        * (model.intermediate_size + model.hidden_size)
        for model in (inputs.teacher, inputs.student)
    )
    return Step(
        "translate",
        4.0 * student.weights * rows * mean
        + 2.0 * weights * (steps + 1) * mean
        + neurons
        + _translations(config, inputs, steps),
        4 * student.weights,
        both
        + optimizer_bytes(hypernetwork_parameters(inputs))
        + 2 * delta_bytes(config, inputs)
        + activations,
        1,
        config.extraction.num_gpus,
    )


def _translations(config: Config, inputs: Inputs, steps: int) -> float:
    """Operations of the hypernetwork: a step takes it twice forward and once backward, to its
    parameters alone; what is baked is translated once more.
    """
    theirs, ours = inputs.teacher.hidden_size, inputs.student.hidden_size
    forward = 2.0 * theirs * (theirs + ours)
    step = 3 * forward + 2.0 * theirs * ours
    return moved_vectors(config, inputs) * (steps * step + forward)


def hypernetwork_parameters(inputs: Inputs) -> int:
    """A two-layer MLP for each of up, down, v, o: 188,743,680 from 13B to 7B."""
    theirs, ours = inputs.teacher.hidden_size, inputs.student.hidden_size
    return int(4 * (theirs * theirs + theirs * ours))


def moved_vectors(config: Config, inputs: Inputs) -> int:
    """How many vectors LaTen translates for one example: 96,576 at 7B."""
    student = inputs.student
    counts = neuron_counts(config.laten.share, student.intermediate_size, student.hidden_size)
    return 2 * (config.laten.layers or student.num_hidden_layers) * sum(counts.values())


def delta_bytes(config: Config, inputs: Inputs, *, dense: bool = False) -> int:
    """LaTen's deltas in float32: a vector of the student's width for each moved neuron's two
    matrices; `dense`: as matrices of the size of those that they are added to.
    """
    student: Any = inputs.student
    if not dense:
        return int(4 * moved_vectors(config, inputs) * student.hidden_size)
    model, layers = skeleton(student), config.laten.layers
    modules = find_modules(model, ("up_proj", "down_proj", "v_proj", "o_proj"), layers=layers)
    return int(4 * sum(weight.numel() for weight in _weights(model, modules.values())))


def _weights(model: nn.Module, paths: Iterable[str]) -> Iterable[nn.Parameter]:
    for path in paths:
        weight = model.get_submodule(path).weight
        assert isinstance(weight, nn.Parameter)
        yield weight
