"""Train student layer(s) k to say what the teacher said (section 4.3, Eq. 5).

The global batch is cut across workers, and every sum is divided by the global batch's counts, so
the gradient does not depend on how many workers there are.
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

from semalign.core.losses import transfer_loss
from semalign.data.tokens import Tokens
from semalign.errors import Diverged
from semalign.models.adapters import load_trainable_state, trainable_state
from semalign.stages.job import Hyperparameters
from semalign.stages.student import StudentTail


@dataclass
class Epoch:
    """What one epoch measured: series with one value a step, numbered from `first_step`.

    Named `loss`, `lr`, and of the terms whose weight is not zero `<objective>_loss`,
    `cross_entropy`, `kl_divergence`; NaN where a batch has nothing that the term looks at.
    """

    epoch: int
    first_step: int
    series: dict[str, list[float]] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """One step's value of each series."""
        for name, value in values.items():
            self.series.setdefault(name, []).append(value)

    def summary(self) -> dict[str, float]:
        """Each series' mean over the steps that have a value; `alignment_cosine` is 1 - L_cos."""
        means = {
            name: math.fsum(measured) / len(measured)
            for name, values in self.series.items()
            if name != "lr" and (measured := [v for v in values if not math.isnan(v)])
        }
        if "cosine_loss" in means:
            means["alignment_cosine"] = 1 - means["cosine_loss"]
        return {"epoch": self.epoch, **means}


def learning_rate(step: int, total: int, *, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up, then linear decay to zero at `total` steps; step counts from 0."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(1, total - warmup)


def global_batches(
    tokens: Sequence[Tokens], batch_size: int, *, seed: int, epoch: int
) -> Iterator[list[int]]:
    """The epoch's shuffled batches: the same on every worker, and after a resumption.

    Labelled examples are spread evenly over the epoch, so that few of them do not meet by chance.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(tokens), generator=generator).tolist()
    parts = [[e for e in order if tokens[e].labelled is labelled] for labelled in (True, False)]
    placed = [((i + 0.5) / len(part), e) for part in parts for i, e in enumerate(part)]
    order = [e for _, e in sorted(placed, key=lambda place: place[0])]
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def train(
    tail: nn.Module,
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
    student: StudentTail = tail.module if hasattr(tail, "module") else tail  # type: ignore[assignment]
    model, tokens = student.model, student.supervision.tokens
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    per_epoch = math.ceil(len(tokens) / settings.batch_size)
    total = per_epoch * settings.epochs
    first = _restore(resume, model, optimizer) if resume else 0
    for epoch in range(first, settings.epochs):
        measured = Epoch(epoch=epoch + 1, first_step=epoch * per_epoch)
        batches = global_batches(tokens, settings.batch_size, seed=settings.seed, epoch=epoch)
        for offset, batch in enumerate(batches):
            step = measured.first_step + offset
            lr = learning_rate(step, total, peak=settings.lr, warmup_ratio=settings.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            terms = _backward(tail, student, batch, rank, world_size)
            loss = _total(terms, settings)
            if not math.isfinite(loss):
                names = ", ".join(tokens[e].id for e in batch[:8])
                more = f" and {len(batch) - 8} more" if len(batch) > 8 else ""
                raise Diverged(f"loss is {loss} at step {step + 1}; examples {names}{more}")
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            measured.add({"loss": loss, **_named(terms, settings), "lr": lr})
        on_epoch(measured, lambda folder, done=epoch + 1: _save(folder, model, optimizer, done))  # type: ignore[misc]


def _backward(
    tail: nn.Module, student: StudentTail, batch: list[int], rank: int, world_size: int
) -> dict[str, float | None]:
    """Accumulate this worker's part of the gradient; the mean of each term over the global batch,
    None where the batch has nothing that the term looks at.
    """
    counts = student.counts(batch)
    useful = student.useful(batch)
    mine = sorted(useful[rank::world_size], key=lambda e: len(student.supervision.tokens[e].ids))
    weight = 1.0 if mine else 0.0  # a worker without examples still takes part in the reduction
    mine = mine or batch[:1]
    size = student.settings.micro_batch_size
    micro = [mine[i : i + size] for i in range(0, len(mine), size)]
    totals = torch.zeros(len(counts), dtype=torch.float64)
    for index, examples in enumerate(micro):
        last = index == len(micro) - 1
        quiet = contextlib.nullcontext() if last or world_size == 1 else tail.no_sync()
        with quiet:
            sums = tail(examples)
            means = {name: sums[name] / max(1, count) for name, count in counts.items()}
            part = _total(means, student.settings)
            (part * weight * world_size).backward()  # DDP averages over workers; Eq. 3-4 sum
        totals += weight * torch.stack([sums[name].detach().double() for name in counts]).cpu()
    if world_size > 1:
        totals = _all_reduce(totals, next(tail.parameters()).device)
    return {
        name: total / count if count else None
        for (name, count), total in zip(counts.items(), totals.tolist(), strict=True)
    }


def _total(terms, settings: Hyperparameters):  # type: ignore[no-untyped-def]
    """Eq. 5 of terms, as numbers or as tensors; those that are None or absent add nothing."""
    present = {name: value for name, value in terms.items() if value is not None}
    return transfer_loss(**present, alpha=settings.alpha, beta=settings.beta, gamma=settings.gamma)


def _named(terms: dict[str, float | None], settings: Hyperparameters) -> dict[str, float]:
    """The terms under the names that people are shown."""
    names = {
        "alignment": f"{settings.objective}_loss",
        "cross_entropy": "cross_entropy",
        "divergence": "kl_divergence",
    }
    return {names[t]: math.nan if value is None else value for t, value in terms.items()}


def _all_reduce(sums: Tensor, device: torch.device) -> Tensor:
    sums = sums.to(device)
    dist.all_reduce(sums)
    return sums.cpu()


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
