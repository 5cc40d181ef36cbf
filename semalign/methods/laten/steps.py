"""Training LaTen's hypernetwork: one optimiser step an example, the student itself frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from semalign.config.sections import Laten
from semalign.core.losses import supervised_cross_entropy
from semalign.errors import Diverged
from semalign.methods.laten.hypernet import Move, injected, size_penalty, translate
from semalign.methods.laten.trace import LatenRow
from semalign.models.decoder import Decoder, logits, run_base

_BETAS = (0.9, 0.95)
_WARMUP, _START = 0.1, 25  # of OneCycle: the share that warms up, peak over first and last lr

Item = TypeVar("Item")


@dataclass(frozen=True)
class HypernetworkStep:
    """One optimiser step, counted from 1: means over the pool. loss = cross_entropy + size_penalty
    * penalty, where penalty is the sum over module names of mean(delta^2).
    """

    step: int
    example: str
    loss: float
    cross_entropy: float
    penalty: float
    lr: float


def train_hypernetwork(
    net: nn.ModuleDict,
    student: Decoder,
    wanted: Sequence[Sequence[Move]],
    examples: Sequence[LatenRow],
    align: Sequence[LatenRow],
    *,
    cycle: int,
    settings: Laten,
    seed: int,
    on_step: Callable[[HypernetworkStep], None] | None = None,
) -> list[HypernetworkStep]:
    """A step for each of `wanted`, the moves located by the example of the same index.

    Its pool is that example and `settings.pool` - 1 rows of `align`, drawn anew from `seed` and the
    step. Raises Diverged before the step that would use a loss that is not finite.
    Cost a step: forward and backward of the student on the pool, and D_T (6 D_T + 8 D_S)
    operations of `net` a vector (twice forward, once backward, where the vectors get no gradient).
    """
    decay = settings.weight_decay
    optimizer = torch.optim.AdamW(net.parameters(), betas=_BETAS, weight_decay=decay)
    history: list[HypernetworkStep] = []
    for step, (targets, example) in enumerate(zip(wanted, examples, strict=True)):
        lr, beta1 = one_cycle(step, cycle, settings.lr)
        for group in optimizer.param_groups:
            group.update(lr=lr, betas=(beta1, _BETAS[1]))
        pool = [*drawn(align, settings.pool - 1, seed * 100_003 + step), example]
        optimizer.zero_grad(set_to_none=True)
        entropy, penalty = accumulate(net, student, targets, pool, settings.size_penalty)
        loss = entropy + settings.size_penalty * penalty
        if not math.isfinite(loss):
            names = ", ".join(row.id for row in pool[-8:])
            raise Diverged(f"loss is {loss} at step {step + 1}; among the examples {names}")
        optimizer.step()
        history.append(HypernetworkStep(step + 1, example.id, loss, entropy, penalty, lr))
        if on_step is not None:
            on_step(history[-1])
    return history


def one_cycle(step: int, cycle: int, peak: float) -> tuple[float, float]:
    """Learning rate and AdamW's beta1 at a 0-based step: torch's OneCycleLR as the authors call it.

    Cosines from peak / 25 up to peak during the first tenth and back; beta1 from .95 down to .85
    and back, in the place of the .9 that the optimiser was given. A cycle of 10 steps, where
    torch divides by zero, starts at the peak.
    """
    top, last = _WARMUP * cycle - 1, cycle - 1
    warming = step <= top and top > 0
    done = step / top if warming else (step - top) / (last - top)
    height = (1 - math.cos(math.pi * done)) / 2 if warming else (1 + math.cos(math.pi * done)) / 2
    low = peak / _START
    return low + (peak - low) * height, 0.95 - 0.1 * height


def accumulate(
    net: nn.ModuleDict,
    student: Decoder,
    wanted: Sequence[Move],
    pool: Sequence[LatenRow],
    weight: float,
) -> tuple[float, float]:
    """Gradients of sum over the pool of (cross-entropy + weight * penalty) into net's parameters.

    Returns the mean cross-entropy and the penalty. The deltas are leaves of their own for the rows'
    passes; what reached them goes through net once for all rows, which is the same sum.
    """
    with torch.no_grad():
        deltas = translate(net, wanted)
    for delta in deltas:
        delta.value.requires_grad_()
    entropy = 0.0
    with injected(student, deltas):
        for row in pool:
            loss = answer_loss(student, row)
            loss.backward()
            entropy += loss.item() / len(pool)
    penalty = size_penalty(deltas)
    (len(pool) * weight * penalty).backward()
    for move, delta in zip(wanted, deltas, strict=True):
        translate(net, [move])[0].value.backward(delta.value.grad)
    return entropy, penalty.item()


def answer_loss(student: Decoder, row: LatenRow) -> Tensor:
    """Mean cross-entropy of all answer tokens of one row, the first one too."""
    ids = torch.tensor([row.ids])
    hidden = run_base(student, ids, torch.ones_like(ids))
    scores = logits(student, hidden[0, row.prompt_length - 1 : -1])
    return supervised_cross_entropy(scores, ids[0, row.prompt_length :].to(scores.device))


def drawn(rows: Sequence[Item], count: int, seed: int) -> list[Item]:
    """`count` rows without repetition, or all, in an order of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:count].tolist()]
