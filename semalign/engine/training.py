"""Ray Train: the single-layer update on any number of workers, resumed after any death."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from semalign.errors import Diverged, UserError
from semalign.stages.data import Tokens
from semalign.stages.job import TrainJob
from semalign.stages.train import Epoch

HISTORY = "history.json"  # every step's losses so far, beside each checkpoint


@dataclass(frozen=True, kw_only=True)
class WorkerShape:
    num_workers: int = 1
    cpus_per_worker: float = 1
    use_gpu: bool = False
    max_failures: int = 2


def fit(
    job: TrainJob,
    tokens: Sequence[Tokens],
    shape: WorkerShape,
    *,
    folder: Path,
    name: str,
    tracker: Any,
) -> Path:
    """Train, or go on with a run of that name; returns the last checkpoint's folder.

    Ray Train resumes a run of the same name in the same storage from its last checkpoint: that is
    how a killed driver's rerun goes on. Raises Diverged on a NaN or infinite loss.
    """
    trouble = folder / name / "diverged.json"
    trouble.unlink(missing_ok=True)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "job": job,
            "tokens": [ray.put(list(tokens))],
            "threads": max(1, int(shape.cpus_per_worker)),
            "tracker": tracker,
            "trouble": str(trouble),
        },
        torch_config=TorchConfig(backend="nccl" if shape.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=shape.num_workers,
            use_gpu=shape.use_gpu,
            resources_per_worker={"CPU": shape.cpus_per_worker},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=shape.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, UserError):
                raise failure from None
        raise
    if trouble.exists():
        said = json.loads(trouble.read_text(encoding="utf-8"))["error"]
        good = result.checkpoint.path if result.checkpoint else "none yet"
        raise Diverged(f"{said}; last good checkpoint: {good}")
    if result.error is not None:
        raise result.error
    return Path(result.checkpoint.path)


def _worker(config: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(config["threads"])
    logging.getLogger().setLevel(logging.WARNING)  # a line an epoch is said below
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    tokens: list[Tokens] = ray.get(config["tokens"][0])
    job: TrainJob = config["job"]

    from semalign.models.adapters import save_adapter
    from semalign.stages.prepare import build_tail
    from semalign.stages.train import train

    device = ray.train.torch.get_device()
    tail = build_tail(job, tokens, device)
    model = tail.model
    wrapped = ray.train.torch.prepare_model(tail, move_to_device=False) if world_size > 1 else tail

    history: dict[str, list[float]] = {}

    def on_epoch(measured: Epoch, save: Any) -> None:
        for series in ("loss", "cosine_loss", "cross_entropy", "lr"):
            history.setdefault(series, []).extend(getattr(measured, series))
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = None
            if rank == 0:
                folder = Path(scratch)
                save(folder)
                save_adapter(model, folder / "adapter", job.student.path)
                (folder / HISTORY).write_text(json.dumps(history), encoding="utf-8")
                checkpoint = Checkpoint.from_directory(folder)
                _record(config["tracker"], measured)
                _say(measured)
            ray.train.report(measured.summary(), checkpoint=checkpoint)

    latest = ray.train.get_checkpoint()
    with tempfile.TemporaryDirectory() as scratch:
        resume = None
        if latest is not None:
            resume = Path(latest.to_directory(scratch))
            history = json.loads((resume / HISTORY).read_text(encoding="utf-8"))
        try:
            train(
                wrapped,
                tokens,
                job.settings,
                on_epoch=on_epoch,
                resume=resume,
                rank=rank,
                world_size=world_size,
            )
        except Diverged as error:
            # every rank computes the same loss and ends here; raising would only be retried
            if rank == 0:
                Path(config["trouble"]).write_text(json.dumps({"error": str(error)}), "utf-8")


def _record(tracker: Any, measured: Epoch) -> None:
    """Steps as they were, and the epoch's means; waits, so that a kill loses no written epoch."""
    if tracker is None:
        return
    steps = {
        "train/loss": measured.loss,
        "train/cosine_loss": measured.cosine_loss,
        "train/alignment_cosine": [1 - value for value in measured.cosine_loss],
        "train/cross_entropy": measured.cross_entropy,
        "train/lr": measured.lr,
    }
    epoch = {f"epoch/{k}": [v] for k, v in measured.summary().items() if k != "epoch"}
    ray.get(
        [
            tracker.metrics.remote(steps, first_step=measured.first_step + 1),
            tracker.metrics.remote(epoch, first_step=measured.epoch),
        ]
    )


def _say(measured: Epoch) -> None:
    values = "  ".join(f"{k} {v:.4f}" for k, v in measured.summary().items() if k != "epoch")
    # to a named stream: Ray Train turns a plain print into two lines
    print(f"epoch {measured.epoch}: {values}", file=sys.stderr, flush=True)
