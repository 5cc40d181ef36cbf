"""Train student layer(s) k to say what the teacher said: alpha * L_cos + beta * L_CE (section 4.3).

The layers below the lowest trained one never change, so their output is read from a store and they
are not run; logits are computed at supervised positions only. The global batch is cut across
workers, and every sum is divided by the global batch's counts, so the gradient does not depend on
how many workers there are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from semalign.core.losses import cosine_sum, cross_entropy_sum, transfer_loss
from semalign.errors import Diverged
from semalign.models.adapters import load_trainable_state, trainable_state
from semalign.models.layers import capture, find_decoder, logits, run_from
from semalign.stages.align import Target, Transport
from semalign.stages.data import Tokens, position_mask
from semalign.stages.store import Reader


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Section 4.3 and Table 5; `batch_size` is global, `micro_batch_size` per worker."""

    epochs: int
    lr: float
    batch_size: int
    micro_batch_size: int
    alpha: float
    beta: float
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    positions: str = "all"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The training set: tokens, the trained layer's cached inputs, and the teacher's targets."""

    tokens: Sequence[Tokens]
    first_layer: int
    inputs: Reader
    targets: Sequence[Target]
    transport: Transport


@dataclass
class Epoch:
    """What one epoch measured; lists have one entry a step, numbered from `first_step`."""

    epoch: int
    first_step: int
    loss: list[float] = field(default_factory=list)
    cosine_loss: list[float] = field(default_factory=list)
    cross_entropy: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        def mean(values: list[float]) -> float:
            return math.fsum(values) / len(values)

        return {
            "epoch": self.epoch,
            "loss": mean(self.loss),
            "cosine_loss": mean(self.cosine_loss),
            "alignment_cosine": 1 - mean(self.cosine_loss),
            "cross_entropy": mean(self.cross_entropy),
        }


class StudentTail(nn.Module):
    """Layers k.. of the student: inputs of layer k -> the sums that Eq. 3 and Eq. 4 average."""

    def __init__(self, model: nn.Module, supervision: Supervision, *, positions: str) -> None:
        super().__init__()
        self.model = model
        self.supervision = supervision
        self.positions = positions
        self._decoder = find_decoder(model)

    def forward(self, examples: list[int]) -> tuple[Tensor, Tensor]:
        """Sum of cosines (mean over the targets) and sum of cross-entropies, over `examples`."""
        data = self.supervision
        decoder = self._decoder
        device = next(self.model.parameters()).device
        tokens = [data.tokens[e] for e in examples]
        hidden, mask, ids = self._inputs(examples, device)
        where = position_mask(tokens, lambda e: e.align_positions(self.positions), ids.shape[1])
        wanted = [(target.student, target.interface) for target in data.targets]
        # trained weights are float32; products run in the dtype of the others
        mixed = torch.autocast(device.type, hidden.dtype, enabled=hidden.dtype != torch.float32)
        with mixed, capture(decoder, wanted) as seen:
            final = run_from(decoder, data.first_layer, hidden, mask)
        cosines = torch.zeros((), device=device)
        for target, key in zip(data.targets, wanted, strict=True):
            aligned = data.transport(target.rows(examples).to(device))
            cosines = cosines + cosine_sum(seen[key][where.to(device)], aligned)
        supervised = position_mask(tokens, lambda e: e.supervised_positions, ids.shape[1]).to(
            device
        )
        labels = ids.roll(-1, 1)[supervised]
        with mixed:
            scores = logits(decoder, final[supervised])
        entropy = cross_entropy_sum(scores, labels)
        return cosines / len(data.targets), entropy

    def _inputs(self, examples: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        data = self.supervision
        rows = [data.inputs[e] for e in examples]
        width = max(len(row) for row in rows)
        # a captured parameter dtype may differ from the store's; the tail runs in the model's own
        dtype = next(p.dtype for p in self.model.parameters() if not p.requires_grad)
        hidden = torch.zeros((len(rows), width, rows[0].shape[1]), dtype=dtype)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        for i, (example, row) in enumerate(zip(examples, rows, strict=True)):
            hidden[i, : len(row)] = row
            mask[i, : len(row)] = 1
            ids[i, : len(row)] = torch.tensor(data.tokens[example].ids)
        return hidden.to(device), mask.to(device), ids.to(device)


def learning_rate(step: int, total: int, *, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up, then linear decay to zero at `total` steps; step counts from 0."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(1, total - warmup)


def global_batches(count: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[list[int]]:
    """The epoch's shuffled batches: the same on every worker, and after a resumption."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(count, generator=generator).tolist()
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]


def train(
    tail: nn.Module,
    tokens: Sequence[Tokens],
    settings: Hyperparameters,
    *,
    on_epoch: Callable[[Epoch, Callable[[Path], None]], None],
    resume: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Run (or go on with) all epochs; after each, `on_epoch(measured, save)`.

    tail: a StudentTail, or one wrapped in DistributedDataParallel. `save(folder)` writes what
    `resume` reads. Raises Diverged before the step that would use a NaN or infinite loss.
    Cost a step: forward and backward of layers k.. only; a token of the prefix costs one read.
    """
    model = tail.module.model if hasattr(tail, "module") else tail.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    per_epoch = math.ceil(len(tokens) / settings.batch_size)
    total = per_epoch * settings.epochs
    first = _restore(resume, model, optimizer) if resume else 0
    for epoch in range(first, settings.epochs):
        measured = Epoch(epoch=epoch + 1, first_step=epoch * per_epoch)
        batches = global_batches(len(tokens), settings.batch_size, seed=settings.seed, epoch=epoch)
        for offset, batch in enumerate(batches):
            step = measured.first_step + offset
            lr = learning_rate(step, total, peak=settings.lr, warmup_ratio=settings.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            cosine, entropy = _backward(tail, tokens, batch, settings, rank, world_size)
            loss = settings.alpha * cosine + settings.beta * entropy
            if not math.isfinite(loss):
                names = ", ".join(tokens[e].id for e in batch[:8])
                more = f" and {len(batch) - 8} more" if len(batch) > 8 else ""
                raise Diverged(f"loss is {loss} at step {step + 1}; examples {names}{more}")
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            measured.loss.append(loss)
            measured.cosine_loss.append(cosine)
            measured.cross_entropy.append(entropy)
            measured.lr.append(lr)
        on_epoch(measured, lambda folder, done=epoch + 1: _save(folder, model, optimizer, done))  # type: ignore[misc]


def _backward(
    tail: nn.Module,
    tokens: Sequence[Tokens],
    batch: list[int],
    settings: Hyperparameters,
    rank: int,
    world_size: int,
) -> tuple[float, float]:
    """Accumulate this worker's part of the gradient; returns the global L_cos and L_CE."""
    aligned = sum(_length(tokens[e].align_positions(settings.positions)) for e in batch)
    supervised = sum(_length(tokens[e].supervised_positions) for e in batch)
    mine = sorted(batch[rank::world_size], key=lambda e: len(tokens[e].ids))
    weight = 1.0 if mine else 0.0  # a worker without examples still takes part in the reduction
    mine = mine or batch[:1]
    size = settings.micro_batch_size
    micro = [mine[i : i + size] for i in range(0, len(mine), size)]
    sums = torch.zeros(2, dtype=torch.float64)
    for index, examples in enumerate(micro):
        last = index == len(micro) - 1
        quiet = contextlib.nullcontext() if last or world_size == 1 else tail.no_sync()
        with quiet:
            cosines, entropy = tail(examples)
            # Eq. 3's constant 1 has no gradient and is added once, below
            part = transfer_loss(
                -cosines / aligned, entropy / supervised, alpha=settings.alpha, beta=settings.beta
            )
            (part * weight * world_size).backward()  # DDP averages over workers; Eq. 3-4 sum
        sums += weight * torch.stack([cosines.detach(), entropy.detach()]).double().cpu()
    if world_size > 1:
        sums = _all_reduce(sums, next(tail.parameters()).device)
    return 1 - sums[0].item() / aligned, sums[1].item() / supervised


def _all_reduce(sums: Tensor, device: torch.device) -> Tensor:
    sums = sums.to(device)
    dist.all_reduce(sums)
    return sums.cpu()


def _length(where: slice) -> int:
    return int(where.stop - where.start)


def _save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epochs_done: int
) -> None:
    state = {
        "trainable": trainable_state(model),
        "optimizer": optimizer.state_dict(),
        "epochs_done": epochs_done,
    }
    torch.save(state, folder / "state.pt")


def _restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    load_trainable_state(model, state["trainable"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epochs_done"])
