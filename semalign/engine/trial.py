"""One trial of a sweep, in a process of its own: trained by Ray Train, scored by shared engines.

How it ended is a file: `finished/<id>.json`, `failed/<id>.json` or `stopped/<id>.json` in the
sweep's folder.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from semalign.artifacts.files import write_json
from semalign.artifacts.records import read_records
from semalign.config.jobs import Config
from semalign.engine import recording, sweep_recording
from semalign.engine.methods import make
from semalign.engine.scoring import score_candidates
from semalign.engine.steps import Steps
from semalign.engine.tracking import Run
from semalign.engine.transfer import transferred
from semalign.sweep.file import Sweep
from semalign.sweep.summary import Result, finished
from semalign.sweep.trials import Trial

Engines = dict[str, list[Any]]  # by model
DIED = "its process died; the same command again runs it"


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every trial is handed: the trials and their inputs, the sweep's run and engines."""

    sweep: Sweep
    trials: dict[str, Trial]
    inputs: dict[str, Any]  # references to Inputs in Ray's store
    run: Run
    engines: Engines
    folder: Path


def open_run(run: Run, trial: Trial) -> Run:
    """The trial's run in MLflow, below the sweep's."""
    return run.child(key=trial.id, name=f"{trial.label}, seed={trial.seed}")


def run_trial(params: dict[str, str], shared: Shared) -> None:
    """The transfer of `params["trial"]`, and its score to Ray Tune."""
    _set_up_ray_train()
    trial = shared.trials[params["trial"]]
    try:
        score = _transfer(trial, shared)
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # without Ray's traceback around it
        said = f"{type(cause).__name__}: {cause}"
        write_json(ended(shared.folder, trial, "failed"), {"error": said})
        raise
    ended(shared.folder, trial, "failed").unlink(missing_ok=True)
    tune.report({"score": score, "epoch": trial.config.epochs})


def _set_up_ray_train() -> None:
    """What Ray Train reads in the process that starts a training; the user's own settings win."""
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how late the end of a training is noticed
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",  # trials may wait for each other
    }
    if len(ray.nodes()) == 1:  # the only node is not taken away: spare a process for each trial
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _transfer(trial: Trial, shared: Shared) -> float:
    begin, config = time.monotonic(), trial.config
    run = open_run(shared.run, trial)
    steps = Steps(config, ray.get(shared.inputs[trial.id]), quiet=True)
    metric = shared.sweep.metric(config.data.task)
    scored = EpochScore(config, shared.engines, *metric) if shared.sweep.scheduler else None
    recording.start(run, steps)
    folder = make(steps, run, scored).folder
    evaluation = score_candidates(config, [transferred(config, folder)], shared.engines)
    sweep_recording.finish_trial(run, trial, steps, folder, evaluation)
    records = {f"{task}/{split}": str(file) for (_, task, split), file in evaluation.files.items()}
    write_json(
        ended(shared.folder, trial, "finished"),
        {"seconds": time.monotonic() - begin, "folder": str(folder), "records": records},
    )
    return evaluation.scores[recording.TRANSFERRED, *metric].value


@dataclass(frozen=True)
class EpochScore:
    """The score by which the scheduler stops trials, after every epoch, from a training worker."""

    config: Config
    engines: Engines
    task: str
    split: str

    def __call__(self, folder: Path) -> float:
        settings = self.config.evaluation.model_copy(
            update={"tasks": (self.task,), "splits": (self.split,)}
        )
        config = self.config.model_copy(update={"evaluation": settings})
        candidate = replace(transferred(config, folder), name="epoch")
        evaluation = score_candidates(config, [candidate], self.engines, judge_cpus=0)
        return evaluation.scores["epoch", self.task, self.split].value


def ended(folder: Path, trial: Trial, how: str) -> Path:
    """The file that says so; `how`: finished, failed or stopped."""
    return folder / how / f"{trial.id}.json"


def stop(folder: Path, trial: Trial, sweep: Sweep, reported: dict[str, Any]) -> None:
    """Remember that the scheduler has stopped a trial, after which epoch and at which score."""
    assert sweep.scheduler is not None
    said = {"epoch": reported["epoch"], "score": reported["score"]}
    by = sweep.scheduler.model_dump(mode="json")
    write_json(ended(folder, trial, "stopped"), said | {"scheduler": by})


def was_stopped(folder: Path, trial: Trial, sweep: Sweep) -> dict[str, Any] | None:
    """Epoch and score at which this sweep's scheduler, with these settings, stopped the trial."""
    file = ended(folder, trial, "stopped")
    if sweep.scheduler is None or not file.exists():
        return None
    said = dict(json.loads(file.read_text(encoding="utf-8")))
    return said if said["scheduler"] == sweep.scheduler.model_dump(mode="json") else None


def is_done(folder: Path, trial: Trial, sweep: Sweep) -> bool:
    """Whether the trial need not be run again."""
    finished = ended(folder, trial, "finished").exists()
    return finished or was_stopped(folder, trial, sweep) is not None


def result(folder: Path, trial: Trial, sweep: Sweep) -> Result:
    """How a trial ended, from its files."""
    if (file := ended(folder, trial, "finished")).exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        records = {
            (task, split): read_records(Path(path))
            for name, path in found["records"].items()
            for task, _, split in [name.partition("/")]
        }
        return finished(trial, records, found["seconds"], recording.manifest(Path(found["folder"])))
    if was_stopped(folder, trial, sweep) is not None:
        return Result(trial=trial)
    file = ended(folder, trial, "failed")
    said = json.loads(file.read_text(encoding="utf-8"))["error"] if file.exists() else DIED
    return Result(trial=trial, error=said)
