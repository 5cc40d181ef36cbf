"""LaTen (Tan et al., 2025): neurons of the teacher, translated, added to neurons of the student.

    transfer   locate neurons by an example in both models, train the hypernetwork for a few steps,
               translate the neurons of one more example
    bake       the student with those deltas in its weights, as an ordinary checkpoint

docs/laten.md has the formulas, the costs, and where this differs from the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from semalign.config.jobs import Config
from semalign.config.sections import Laten
from semalign.errors import UserError
from semalign.files import making
from semalign.methods.laten.hypernet import (
    Delta,
    add_to_weights,
    hypernetwork,
    initialise,
    moves,
    translate,
)
from semalign.methods.laten.neurons import Located, locate
from semalign.methods.laten.steps import HypernetworkStep, Item, drawn, train_hypernetwork
from semalign.methods.laten.trace import Kind, LatenRow, in_teacher_ids, last_useful
from semalign.models.decoder import Decoder, find_decoder
from semalign.models.loading import load_model, save_model

STEPS: dict[str, int] = {"mmlu": 2, "gsm8k": 4, "humaneval": 3, "mbpp": 8}  # Table 4
_OTHER_STEPS = 4  # of a task that the table does not have


@dataclass(frozen=True)
class Translation:
    """What is to be added to the student (on the CPU), the example whose neurons these are, the
    history, and the number of parameters that were trained.
    """

    deltas: list[Delta]
    located_by: str
    steps: list[HypernetworkStep]
    parameters: int


def neuron_counts(share: float, intermediate_size: int, hidden_size: int) -> dict[Kind, int]:
    """Neurons a layer in both models: floor(share * the student's sizes); 1100 and 409 at 7B."""
    exact = Fraction(str(share))
    return {"ffn": int(exact * intermediate_size), "attn": int(exact * hidden_size)}


def located_shape(student: Any, settings: Laten) -> tuple[int, dict[Kind, int]]:
    """Layers, and neurons of a layer, that are located in both models, by the student's
    configuration.
    """
    counts = neuron_counts(settings.share, student.intermediate_size, student.hidden_size)
    return settings.layers or student.num_hidden_layers, counts


def planned_steps(settings: Laten, task: str, rows: int) -> int:
    """`laten.steps`, or Table 4's of the task, but then at most one for each attribution row.

    Raises UserError for a `laten.steps` above the number of rows.
    """
    if settings.steps is None:
        return min(STEPS.get(task, _OTHER_STEPS), rows)
    if settings.steps > rows:
        raise UserError(
            f"laten.steps={settings.steps}: expected at most {rows}, one for each row of "
            "data.attribution_split"
        )
    return settings.steps


def labelled_rows(
    config: Config, train: Sequence[Item], align: Sequence[Item]
) -> tuple[list[Item], list[Item]]:
    """The rows of the training and the alignment split that carry their answers: of the training
    split, which may be both, the first `data.labelled_limit`.
    """
    limit = config.data.labelled_limit
    same = config.laten.align_split == config.data.train_split
    return list(train[:limit]), list(align[: limit if same else None])


def translate_neurons(
    teacher: nn.Module,
    student: nn.Module,
    *,
    train: Sequence[LatenRow],
    attribution: Sequence[LatenRow],
    align: Sequence[LatenRow],
    student_to_teacher: Tensor,
    decode: Callable[[int], str],
    task: str,
    settings: Laten,
    seed: int,
    on_step: Callable[[HypernetworkStep], None] | None = None,
) -> Translation:
    """Train the hypernetwork, then translate the neurons of one row of `train`.

    Rows hold the student's ids; `student_to_teacher` (Overlap) gives the teacher's; `decode(id)` is
    the text of a student id, "" for special tokens. Each step takes the next row of `attribution`,
    in an order drawn from `seed`. Both models are located in on all rows first, and stay unchanged.
    Memory on top of the models: the hypernetwork four times over (weights, gradients, AdamW), the
    deltas and their gradients, the activations of one row. Nothing is kept on disk: a transfer
    that was killed starts over.

    Raises UserError for a split without rows, rows without answers, more steps than attribution
    rows, a token that only one vocabulary has, models of another form, too small or offloaded, and
    a student in float16; Diverged for a loss that is not finite.
    """
    ours, theirs = find_decoder(student), find_decoder(teacher)
    _check(ours, {"train": train, "attribution": attribution, settings.align_split: align})
    steps = planned_steps(settings, task, len(attribution))
    cycle = settings.cycle or len(attribution)
    if cycle < steps:
        raise UserError(f"laten.cycle={cycle}: expected at least the {steps} steps that are made")
    rows = [*drawn(attribution, steps, seed), *drawn(train, 1, seed)]
    located = _locate_both(teacher, student, rows, student_to_teacher, decode, settings)
    wanted = [moves(theirs, ours, *neurons) for neurons in located]

    net = hypernetwork(theirs.lm_head.in_features, ours.lm_head.in_features)
    initialise(net, seed)
    net.to(ours.lm_head.weight.device)
    student.requires_grad_(False)
    history = train_hypernetwork(
        net,
        ours,
        wanted[:steps],
        rows[:steps],
        align,
        cycle=cycle,
        settings=settings,
        seed=seed,
        on_step=on_step,
    )
    with torch.no_grad():
        deltas = [delta.to("cpu") for delta in translate(net, wanted[-1])]
    return Translation(deltas, rows[-1].id, history, sum(p.numel() for p in net.parameters()))


def bake(
    student: str | Path,
    deltas: Sequence[Delta],
    out: str | Path,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write student + deltas as an ordinary float32 checkpoint, tokenizer included.

    `out` is there whole or not at all. Memory: the student in
    float32. In bfloat16 most of what is added would be rounded away.
    """
    model = load_model(student, dtype="float32", trust_remote_code=trust_remote_code)
    add_to_weights(find_decoder(model), deltas)
    with making(Path(out)) as partial:
        save_model(model, partial, student)


def _locate_both(
    teacher: nn.Module,
    student: nn.Module,
    rows: Sequence[LatenRow],
    student_to_teacher: Tensor,
    decode: Callable[[int], str],
    settings: Laten,
) -> list[tuple[Located, Located]]:
    """The neurons of each row in the teacher and in the student."""
    queries = [last_useful(row, decode) for row in rows]
    table = student_to_teacher.tolist()
    translated = [in_teacher_ids(query, table) for query in queries]
    layers, counts = located_shape(find_decoder(student).base.config, settings)
    shape: dict[str, Any] = {
        "num_layers": layers,
        "counts": counts,
        "readout": settings.readout,
    }
    student_neurons = locate(student, queries, who="student", **shape)
    teacher_neurons = locate(teacher, translated, who="teacher", **shape)
    return list(zip(teacher_neurons, student_neurons, strict=True))


def _check(student: Decoder, splits: dict[str, Sequence[LatenRow]]) -> None:
    if student.lm_head.weight.dtype == torch.float16:
        raise UserError(
            "dtype=float16: LaTen's first deltas are about 1e-8, which is 0 in it; expected "
            "float32 or bfloat16"
        )
    for name, rows in splits.items():
        if not rows:
            raise UserError(
                f"split {name}: no rows; LaTen needs training, attribution and "
                "alignment rows (laten.align_split)"
            )
        for row in rows:
            if len(row.ids) <= row.prompt_length:
                raise UserError(f"example {row.id}: no answer; LaTen trains on labelled rows only")
