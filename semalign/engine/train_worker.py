"""Ray Train: an update on several workers or GPUs, resumed after any death."""

from __future__ import annotations

import json
import logging
import math
import tempfile
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

from semalign.artifacts.artifact import Workspace
from semalign.artifacts.host import Observer
from semalign.config.jobs import Config
from semalign.errors import Diverged, UserError, root_cause
from semalign.stages.update import Update, diverged

if TYPE_CHECKING:  # only the workers train: spare the others a second of imports
    from semalign.stages.training import Epoch


def fit(
    update: Update,
    config: Config,
    workspace: Workspace,
    observe: Observer | None = None,
    *,
    reports: bool = False,
) -> Path:
    """Train, or go on with the same update; returns the last checkpoint's folder.

    `observe` is called on rank 0 after every epoch; with `reports` the score that it returns, if
    any, is reported to the Ray Tune trial around.

    Ray Train resumes a run of the same name in the same storage from its last checkpoint: that is
    how a killed driver's rerun goes on. Raises Diverged on a NaN or infinite loss.
    """
    training, scratch = config.training, workspace.scratch(update)
    trouble = scratch / "diverged.json"
    trouble.unlink(missing_ok=True)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "update": [ray.put(update)],
            "workspace": workspace,
            "threads": max(1, math.floor(training.cpus_per_worker)),
            "observe": observe,
            "trouble": str(trouble),
        },
        torch_config=TorchConfig(backend="nccl" if training.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=training.num_workers,
            use_gpu=training.use_gpu,
            resources_per_worker={"CPU": training.cpus_per_worker},
        ),
        run_config=RunConfig(
            name=scratch.name,
            storage_path=str(scratch.parent),
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[_EpochReports()] if reports else [],
        ),
    )
    try:
        result = trainer.fit()
    except WorkerGroupError as error:
        if isinstance(cause := root_cause(error), UserError):
            raise cause from None
        raise
    if trouble.exists():
        found = json.loads(trouble.read_text(encoding="utf-8"))["error"]
        raise diverged(found, Path(result.checkpoint.path) if result.checkpoint else None)
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
    logging.getLogger().setLevel(logging.WARNING)  # `report` prints a line an epoch
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    update: Update = ray.get(config["update"][0])

    from semalign.stages.supervision import reaches_output
    from semalign.stages.training import Save, train
    from semalign.stages.update import Progress, print_epoch, supervised_student

    device = ray.train.torch.get_device()
    student = supervised_student(update, config["workspace"], device)
    wrapped: Any = student
    if world_size > 1:
        # without a loss at the output, nothing above the last target gets a gradient
        unused = {"find_unused_parameters": not reaches_output(update.loss)}
        wrapped = ray.train.torch.prepare_model(
            student, move_to_device=False, parallel_strategy_kwargs=unused
        )

    def on_epoch(measured: Epoch, save: Save) -> None:
        progress.add(measured)
        summary = measured.summary()
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = None
            if rank == 0:
                progress.write(Path(scratch), measured, save)
                checkpoint = Checkpoint.from_directory(scratch)
                print_epoch(measured)
                if config["observe"]:
                    score = config["observe"](measured, progress.keep)
                    summary |= {} if score is None else {"score": score}
            ray.train.report(summary, checkpoint=checkpoint)

    latest = ray.train.get_checkpoint()
    with tempfile.TemporaryDirectory() as scratch:
        resume = None if latest is None else Path(latest.to_directory(scratch))
        progress = Progress(update, student, resume, workers=world_size)
        try:
            train(
                wrapped,
                update.training,
                update.seed,
                on_epoch=on_epoch,
                resume=resume,
                rank=rank,
                world_size=world_size,
            )
        except Diverged as error:
            # every rank computes the same loss and ends here; raising would only be retried
            if rank == 0:
                Path(config["trouble"]).write_text(json.dumps({"error": str(error)}), "utf-8")
