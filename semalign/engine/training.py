"""Ray Train: the single-layer update on any number of workers, resumed after any death."""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from ray.tune.integration.ray_train import TuneReportCallback

from semalign.data.tokens import Tokens
from semalign.engine.tracking import Run
from semalign.errors import Diverged, UserError
from semalign.stages.job import TrainJob

if TYPE_CHECKING:  # only the workers train: spare the others a second of imports
    from semalign.stages.training import Epoch

Score = Callable[[Path], float]  # of what was trained so far, in a folder

HISTORY = "history.json"  # every step's losses so far, beside each checkpoint
MEASURED = "measured.json"  # what was trained, and what it took


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
    run: Run | None,
    score: Score | None = None,
) -> Path:
    """Train, or go on with a run of that name; returns the last checkpoint's folder.

    With ``score``, that of the adapter is reported after every epoch, to the Ray Tune trial around.

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
            "run": run,
            "score": score,
            "scratch": str(folder / name / "epochs"),
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
            callbacks=[_EpochReports()] if score else [],
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


class _EpochReports(TuneReportCallback):
    """To the Ray Tune trial around go the epochs that have a score."""

    def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
        if "score" in metrics[0]:
            super().after_report(run_context, metrics, checkpoint)


def _worker(config: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(config["threads"])
    logging.getLogger().setLevel(logging.WARNING)  # a line an epoch is said below
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    tokens: list[Tokens] = ray.get(config["tokens"][0])
    job: TrainJob = config["job"]

    from semalign.stages.measure import peak_bytes
    from semalign.stages.prepare import build_tail, save_result
    from semalign.stages.training import train

    device = ray.train.torch.get_device()
    tail = build_tail(job, tokens, device)
    model, wrapped = tail.model, tail
    if world_size > 1:
        # without a loss at the output, what of layer k comes after the last target gets no gradient
        unused = {"find_unused_parameters": not job.settings.reaches_output}
        wrapped = ray.train.torch.prepare_model(
            tail, move_to_device=False, parallel_strategy_kwargs=unused
        )

    history: dict[str, list[float | None]] = {}
    begin, before = time.monotonic(), 0.0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def on_epoch(measured: Epoch, save: Any) -> None:
        for name, values in measured.series.items():
            known = [None if math.isnan(value) else value for value in values]
            history.setdefault(name, []).extend(known)
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = None
            if rank == 0:
                folder = Path(scratch)
                save(folder)
                save_result(model, job, folder, last=measured.epoch == job.settings.epochs)
                (folder / HISTORY).write_text(json.dumps(history), encoding="utf-8")
                took = {
                    "pairs": [str(pair) for pair in job.pairs],
                    "epochs": measured.epoch,
                    "trained_parameters": trained,
                    "seconds": before + time.monotonic() - begin,
                    "peak_bytes": peak_bytes(device),
                }
                (folder / MEASURED).write_text(json.dumps(took), encoding="utf-8")
                checkpoint = Checkpoint.from_directory(folder)
                _record(config["run"], measured)
                _say(measured)
            summary = measured.summary()
            # the last epoch's score is the trial's own to report, when all is done
            if rank == 0 and config["score"] and measured.epoch < job.settings.epochs:
                summary["score"] = config["score"](_kept(model, job, config, measured.epoch))
            ray.train.report(summary, checkpoint=checkpoint)

    latest = ray.train.get_checkpoint()
    with tempfile.TemporaryDirectory() as scratch:
        resume = None
        if latest is not None:
            resume = Path(latest.to_directory(scratch))
            history = json.loads((resume / HISTORY).read_text(encoding="utf-8"))
            before = json.loads((resume / MEASURED).read_text(encoding="utf-8"))["seconds"]
        try:
            train(
                wrapped,
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


def _kept(model: Any, job: TrainJob, config: dict[str, Any], epoch: int) -> Path:
    """What is trained as of this epoch, where an engine on any node can read it."""
    from semalign.stages.prepare import save_result

    folder = Path(config["scratch"]) / str(epoch)
    save_result(model, job, folder)
    return folder


def _record(run: Run | None, measured: Epoch) -> None:
    """Steps as they were, and the epoch's means; waits, so that a kill loses no written epoch."""
    if run is None:
        return
    steps = {f"train/{name}": values for name, values in measured.series.items()}
    if "cosine_loss" in measured.series:
        cosine = [1 - value for value in measured.series["cosine_loss"]]
        steps["train/alignment_cosine"] = cosine
    epoch = {f"epoch/{k}": [v] for k, v in measured.summary().items() if k != "epoch"}
    run.metrics(steps, first_step=measured.first_step + 1)
    run.metrics(epoch, first_step=measured.epoch)


def _say(measured: Epoch) -> None:
    values = "  ".join(f"{k} {v:.4f}" for k, v in measured.summary().items() if k != "epoch")
    # to a named stream: Ray Train turns a plain print into two lines
    print(f"epoch {measured.epoch}: {values}", file=sys.stderr, flush=True)
