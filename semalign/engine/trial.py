"""One trial of a sweep, in a process of its own: trained there, scored by shared engines.

How it ended is a file: `finished/<id>.json`, `failed/<id>.json` or `stopped/<id>.json` in the
sweep's folder; `reported/<id>.json` comes once it is shown on the report split.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from semalign.artifacts.artifact import Workspace
from semalign.artifacts.local import Executor, LocalExecutor, Timer
from semalign.artifacts.records import read_records
from semalign.engine import recording, sweep_recording
from semalign.engine.evaluation import Scored
from semalign.engine.executor import RayExecutor, threads, trains_here
from semalign.engine.scoring import score_candidates, transferred
from semalign.engine.tracking import Run
from semalign.engine.transfer import make
from semalign.errors import root_cause
from semalign.files import write_json
from semalign.methods.method import Transfer
from semalign.stages.judged import Served
from semalign.sweep.file import Sweep
from semalign.sweep.summary import Result, finished
from semalign.sweep.trials import Trial, every_trials

Running = dict[Served, list[Any]]
DIED = "its process died; the same command again runs it"


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every trial is handed: the trials and their inputs, the sweep's run and engines."""

    sweep: Sweep
    trials: dict[str, Trial]
    inputs: dict[str, Any]  # references to Inputs in Ray's store
    run: Run
    engines: Running
    folder: Path

    def transfer(self, trial: Trial) -> Transfer:
        return Transfer(trial.config, ray.get(self.inputs[trial.id]))


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
        cause = root_cause(error)
        text = f"{type(cause).__name__}: {cause}"
        write_json(ended(shared.folder, trial, "failed"), {"error": text})
        raise
    ended(shared.folder, trial, "failed").unlink(missing_ok=True)
    tune.report({"score": score, "epoch": trial.config.training.epochs})


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
    run, workspace, timer = open_run(shared.run, trial), Workspace(config.work), Timer(quiet=True)
    prepared = shared.transfer(trial)
    metric = shared.sweep.metric(config.data.task)
    recording.start(run, prepared)
    served = workspace.path / "unfinished" / f"epochs-{trial.id}"
    score = EpochScore(prepared, shared.engines, *metric) if shared.sweep.scheduler else None
    observe = recording.EpochRecorder(run, score, served, config.training.epochs)
    with threads(config.training.cpus_per_worker):
        recipe = make(prepared, _executor(prepared, workspace, timer, observe), quiet=True)
    folder = workspace.place(recipe.result)
    recording.describe(folder, config)
    scoring = every_trials(config, shared.sweep.held_back)
    candidate = transferred(prepared, folder)
    scored = score_candidates(scoring, [candidate], shared.engines, judge_cpus=0)
    shutil.rmtree(served, ignore_errors=True)
    sweep_recording.finish_trial(run, trial, folder, scored, timer)
    found = {"seconds": time.monotonic() - begin, "folder": str(folder)}
    write_json(ended(shared.folder, trial, "finished"), {**found, "records": _record_files(scored)})
    return scored.scores[recording.TRANSFERRED, *metric].value


def report(
    trial: Trial, transfer: Transfer, sweep: Sweep, run: Run, engines: Running, folder: Path
) -> None:
    """Score a finished trial on the report split, unless it is, into a file and its run."""
    if (file := ended(folder, trial, "reported")).exists():
        return
    place = json.loads(ended(folder, trial, "finished").read_text(encoding="utf-8"))["folder"]
    config = trial.config.scored_by(splits=(sweep.report.split,))
    scored = score_candidates(config, [transferred(transfer, Path(place))], engines)
    recording.record_scores(open_run(run, trial), scored, config.evaluation)
    write_json(file, {"records": _record_files(scored)})


def _record_files(scored: Scored) -> dict[str, str]:
    return {f"{task}/{split}": str(file) for (_, task, split), file in scored.files.items()}


def _executor(
    prepared: Transfer, workspace: Workspace, timer: Timer, observe: recording.EpochRecorder
) -> Executor:
    """All of a trial in its own process, but for what needs GPUs or several workers."""
    config = prepared.config
    if trains_here(config) and not config.extraction.num_gpus:
        return LocalExecutor(workspace, timer=timer, observe=TuneReports(observe))
    return RayExecutor(
        config, workspace, timer=timer, observe=observe, reports=observe.score is not None
    )


@dataclass(frozen=True)
class TuneReports:
    """Passes every epoch's score on to the Ray Tune trial that this process runs."""

    observe: Callable[..., float | None]

    def __call__(self, measured: Any, keep: Callable[[Path], None]) -> None:
        if (score := self.observe(measured, keep)) is not None:
            tune.report({"score": score, "epoch": measured.epoch})


@dataclass(frozen=True)
class EpochScore:
    """The score by which the scheduler stops trials, after every epoch."""

    transfer: Transfer
    engines: Running
    task: str
    split: str

    def __call__(self, folder: Path) -> float:
        config = self.transfer.config.scored_by(tasks=(self.task,), splits=(self.split,))
        candidate = replace(transferred(self.transfer, folder), name="epoch")
        scored = score_candidates(config, [candidate], self.engines, judge_cpus=0)
        return scored.scores["epoch", self.task, self.split].value


def ended(folder: Path, trial: Trial, how: str) -> Path:
    """The file that records how a trial ended: finished, failed or stopped; or that it is reported,
    its scores on the report split.
    """
    return folder / how / f"{trial.id}.json"


def stop(folder: Path, trial: Trial, sweep: Sweep, reported: dict[str, Any]) -> None:
    """Remember that the scheduler has stopped a trial, after which epoch and at which score."""
    assert sweep.scheduler is not None
    found = {"epoch": reported["epoch"], "score": reported["score"]}
    by = sweep.scheduler.model_dump(mode="json")
    write_json(ended(folder, trial, "stopped"), found | {"scheduler": by})


def was_stopped(folder: Path, trial: Trial, sweep: Sweep) -> dict[str, Any] | None:
    """Epoch and score at which this sweep's scheduler, with these settings, stopped the trial."""
    file = ended(folder, trial, "stopped")
    if sweep.scheduler is None or not file.exists():
        return None
    found = dict(json.loads(file.read_text(encoding="utf-8")))
    return found if found["scheduler"] == sweep.scheduler.model_dump(mode="json") else None


def is_done(folder: Path, trial: Trial, sweep: Sweep) -> bool:
    """Whether the trial need not be run again."""
    finished = ended(folder, trial, "finished").exists()
    return finished or was_stopped(folder, trial, sweep) is not None


def result(folder: Path, trial: Trial, sweep: Sweep, *, reported: bool = False) -> Result:
    """How a trial ended, from its files; `reported`: with the scores on the report split."""
    if (file := ended(folder, trial, "finished")).exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if reported:
            shown = ended(folder, trial, "reported").read_text(encoding="utf-8")
            found["records"] |= json.loads(shown)["records"]
        records = {
            (task, split): read_records(Path(path))
            for name, path in found["records"].items()
            for task, _, split in [name.partition("/")]
        }
        return finished(trial, records, found["seconds"], recording.manifest(Path(found["folder"])))
    if was_stopped(folder, trial, sweep) is not None:
        return Result(trial=trial)
    file = ended(folder, trial, "failed")
    error = json.loads(file.read_text(encoding="utf-8"))["error"] if file.exists() else DIED
    return Result(trial=trial, error=error)
