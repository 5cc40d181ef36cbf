"""The update of the student's layers (section 4.3, Eq. 5): the loop.

The global batch is cut across workers, and every sum is divided by the global batch's counts, so
the gradient does not depend on how many workers there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from semalign.config.sections import Loss, Training
from semalign.core.losses import transfer_loss
from semalign.data.tokens import Tokens
from semalign.errors import Diverged
from semalign.models.adapters import load_trainable_state, trainable_state
from semalign.stages.student import SupervisedStudent

Save = Callable[[Path], None]


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


@contextlib.contextmanager
def seeded(seed: int, epoch: int, rank: int) -> Iterator[None]:
    """Within the context torch's random numbers, such as dropout's, depend on these three alone.

    The process's own random state is as before afterwards. Every epoch begins anew, so a checkpoint
    at its end needs no random state for the next to be the same.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{rank}".encode()).digest()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest[:7]))
        yield


def train(
    wrapped: nn.Module,
    settings: Training,
    seed: int,
    *,
    on_epoch: Callable[[Epoch, Save], None],
    resume: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Run (or go on with) all epochs; after each, `on_epoch(measured, save)`.

    wrapped: a SupervisedStudent, or one in DistributedDataParallel. `settings` have epochs and lr.
    `save(folder)` writes what `resume` reads. Raises Diverged before the step that would use a NaN
    or infinite loss. Cost a step: forward and backward of the trained layers and those above them.
    """
    student: SupervisedStudent = wrapped.module if hasattr(wrapped, "module") else wrapped  # type: ignore[assignment]
    assert settings.lr is not None and settings.epochs is not None
    model, tokens, loss = student.model, student.supervision.tokens, student.supervision.loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    per_epoch = math.ceil(len(tokens) / settings.batch_size)
    total = per_epoch * settings.epochs
    first = _restore(resume, model, optimizer) if resume else 0
    for epoch in range(first, settings.epochs):
        measured = Epoch(epoch=epoch + 1, first_step=epoch * per_epoch)
        batches = list(global_batches(tokens, settings.batch_size, seed=seed, epoch=epoch))
        size = settings.micro_batch_size
        parts = [_micro_batches(student, batch, size, rank, world_size) for batch in batches]
        following = [micro[0] for micro in parts[1:]]
        with seeded(seed, epoch, rank):
            for offset, batch in enumerate(batches):
                step = measured.first_step + offset
                warmup = settings.warmup_ratio
                lr = learning_rate(step, total, peak=settings.lr, warmup_ratio=warmup)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad(set_to_none=True)
                ahead = [*parts[offset][1:], *following[offset : offset + 1]]
                terms = _backward(wrapped, student, batch, parts[offset], ahead, rank, world_size)
                value = _total(terms, loss)
                if not math.isfinite(value):
                    raise _diverged(value, step, [tokens[e] for e in batch])
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
                measured.add({"loss": value, **_named(terms, loss), "lr": lr})
        on_epoch(measured, lambda folder, done=epoch + 1: _save(folder, model, optimizer, done))  # type: ignore[misc]


def _diverged(value: float, step: int, batch: Sequence[Tokens]) -> Diverged:
    names = ", ".join(example.id for example in batch[:8])
    more = f" and {len(batch) - 8} more" if len(batch) > 8 else ""
    return Diverged(f"loss is {value} at step {step + 1}; examples {names}{more}")


def _micro_batches(
    student: SupervisedStudent, batch: list[int], size: int, rank: int, world_size: int
) -> list[list[int]]:
    """This worker's part of a batch, by length; one without examples takes part with the first."""
    mine = student.useful(batch)[rank::world_size]
    mine = sorted(mine, key=lambda e: len(student.supervision.tokens[e].ids)) or batch[:1]
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def _backward(
    wrapped: nn.Module,
    student: SupervisedStudent,
    batch: list[int],
    micro: list[list[int]],
    ahead: list[list[int]],
    rank: int,
    world_size: int,
) -> dict[str, float | None]:
    """Accumulate this worker's part of the gradient; the mean of each term over the global batch,
    None where the batch has nothing that the term looks at. While a GPU computes, what comes after
    each micro-batch is read `ahead`.
    """
    counts = student.counts(batch)
    weight = 1.0 if rank < len(student.useful(batch)) else 0.0
    device = next(wrapped.parameters()).device
    totals = torch.zeros(len(counts), dtype=torch.float64, device=device)
    for index, examples in enumerate(micro):
        last = index == len(micro) - 1
        quiet = contextlib.nullcontext() if last or world_size == 1 else wrapped.no_sync()
        with quiet:
            sums = wrapped(examples)
            if index < len(ahead):
                student.prepare(ahead[index])
            means = {name: sums[name] / max(1, count) for name, count in counts.items()}
            part = _total(means, student.supervision.loss)
            (part * weight * world_size).backward()  # DDP averages over workers; Eq. 3-4 sum
        totals += weight * torch.stack([sums[name].detach().double() for name in counts])
    if world_size > 1:
        dist.all_reduce(totals)
    return {
        name: total / count if count else None
        for (name, count), total in zip(counts.items(), totals.tolist(), strict=True)
    }


def _total(terms, loss: Loss):  # type: ignore[no-untyped-def]
    """Eq. 5 of terms, as numbers or as tensors; those that are None or absent add nothing."""
    present = {name: value for name, value in terms.items() if value is not None}
    return transfer_loss(**present, alpha=loss.alpha, beta=loss.beta, gamma=loss.gamma)


def _named(terms: dict[str, float | None], loss: Loss) -> dict[str, float]:
    """The terms under the names that people are shown."""
    names = {
        "alignment": f"{loss.objective}_loss",
        "cross_entropy": "cross_entropy",
        "divergence": "kl_divergence",
    }
    return {names[t]: math.nan if value is None else value for t, value in terms.items()}


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
