"""A sweep on Ray Tune: what trials share is made once, each is trained and scored, all compared.

Attributions, stores and maps are made before the first trial and found by path; the vLLM engines
are started once and handed to every trial. A trial that has its result file is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from semalign.config import Config
from semalign.core.pairing import Pair
from semalign.engine import recording, sweep_recording
from semalign.engine.cluster import check_resources, cluster_resources, connect
from semalign.engine.dispatch import start_engines, stop_engines
from semalign.engine.evaluation import Candidate
from semalign.engine.methods import make, prepare_whole
from semalign.engine.scoring import engine_shape, score_candidates
from semalign.engine.steps import Need, Steps
from semalign.engine.tracking import Run, start_tracker
from semalign.engine.transfer import transferred
from semalign.errors import UserError
from semalign.report.summary import Key, Result, Summary, finished, summarise
from semalign.stages.inputs import Inputs, check_writable
from semalign.stages.records import read_records
from semalign.stages.store import content_key, write_json
from semalign.stages.sweep import Sweep
from semalign.stages.trial_plan import share_inputs
from semalign.stages.trials import Trial, trials
from semalign.tasks.scores import Score

Engines = dict[str, list[Any]]  # by model


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every trial is handed: the trials and their inputs, the sweep's run and engines."""

    sweep: Sweep
    trials: dict[str, Trial]
    inputs: dict[str, Any]  # references to Inputs in Ray's store
    pairs: dict[str, tuple[Pair, ...]]
    run: Run
    engines: Engines
    folder: Path


def ablate(sweep: Sweep, *, yes: bool = False) -> Summary:
    """Run, or finish, a sweep and print its tables.

    Raises UserError for bad input. A trial that fails does not stop the others.
    """
    if sweep.search == "optuna":
        raise UserError("search=optuna: ranges are drawn at random so far; expected search: random")
    planned = trials(sweep, yes=yes)
    inputs = share_inputs(planned)
    config = planned[0].config
    check_writable(config.work)
    key = content_key(sweep.name, [trial.id for trial in planned], sweep.select.model_dump())
    folder = config.work / "sweeps" / f"{sweep.name}-{key}"
    with connect(config.cluster.address):
        for trial in planned:
            check_resources(trial.config, cluster_resources())
        run = start_tracker(
            config.tracking_uri,
            config.tracking.experiment,
            key=key,
            name=config.tracking.run_name or sweep.name,
            artifacts=str(config.work / "mlartifacts"),
        )
        try:
            summary = _run(sweep, planned, inputs, run, folder)
        except BaseException:
            run.end("FAILED")
            raise
        sweep_recording.finish(run, summary, folder)
        sweep_recording.show(summary, folder, config, run.run_id)
    return summary


def _run(
    sweep: Sweep,
    planned: Sequence[Trial],
    inputs: Mapping[str, Inputs],
    run: Run,
    folder: Path,
) -> Summary:
    begin = time.monotonic()
    todo = [trial for trial in planned if not _file(folder, trial.id).exists()]
    print(f"[sweep] {len(planned)} trials, {len(planned) - len(todo)} finished before", flush=True)
    engines = _start_engines(planned) if todo else {}
    try:
        if todo:
            pairs = prepare(todo, inputs)
        references = score_candidates(*_references(sweep, planned), engines)
        if todo:
            shared = Shared(
                sweep=sweep,
                trials={trial.id: trial for trial in todo},
                inputs=_put(inputs, todo),
                pairs=pairs,
                run=run,
                engines=engines,
                folder=folder,
            )
            _tune(shared)
            _end_stopped(shared)
    finally:
        for group in engines.values():
            stop_engines(group)
    print(f"[sweep] {time.monotonic() - begin:.1f} s", flush=True)
    scores: dict[str, dict[Key, Score]] = {}
    for (name, task, split), score in references.scores.items():
        scores.setdefault(name, {})[task, split] = score
    return summarise(sweep, [_result(folder, trial) for trial in planned], scores)


def _references(sweep: Sweep, planned: Sequence[Trial]) -> tuple[Config, list[Candidate]]:
    """The models to set beside: the student, and where methods are compared the teachers too, on
    all their tasks.
    """
    config = planned[0].config
    if sweep.compare is None:
        return config, [Candidate(name="student", model=config.student)]
    tasks = tuple(dict.fromkeys(trial.config.data.task for trial in planned))
    evaluation = config.evaluation.model_copy(update={"tasks": tasks})
    models = dict.fromkeys(t.config.student for t in planned)
    models |= dict.fromkeys(t.config.teacher for t in planned)
    candidates = [Candidate(name=model, model=model) for model in models]
    return config.model_copy(update={"evaluation": evaluation}), candidates


def prepare(planned: Sequence[Trial], inputs: Mapping[str, Inputs]) -> dict[str, tuple[Pair, ...]]:
    """Attribute and extract once for all trials; the pairs of each."""
    pairs: dict[str, tuple[Pair, ...]] = {}
    needs: dict[Path, tuple[Steps, Need]] = {}
    for trial in planned:
        steps = Steps(trial.config, inputs[trial.id], quiet=True)
        if not trial.config.pairs_layers:
            prepare_whole(steps)
            continue
        pairs[trial.id] = steps.pair(steps.attribute())
        steps.align()
        for need in filter(lambda need: need.columns, steps.needs(pairs[trial.id])):
            path = steps.store_path(need)
            columns = need.columns | (needs[path][1].columns if path in needs else frozenset())
            needs[path] = steps, replace(need, columns=columns)
    for steps, need in needs.values():
        steps.fill(need)
    return pairs


def _put(inputs: Mapping[str, Inputs], planned: Sequence[Trial]) -> dict[str, Any]:
    """Inputs in Ray's store, those that are equal once however many trials have them."""
    placed: dict[Any, Any] = {}
    found = {}
    for trial in planned:
        own = inputs[trial.id]
        key = id(own.train), own.extra_layers
        if key not in placed:
            placed[key] = ray.put(own)
        found[trial.id] = placed[key]
    return found


def _start_engines(planned: Sequence[Trial]) -> Engines:
    """The engines of every student that adapters are trained for, with room for the largest."""
    ranks: dict[str, list[int]] = {}
    for trial in planned:
        ranks.setdefault(trial.config.student, [])
        if (rank := trial.config.adapter_rank) is not None:
            ranks[trial.config.student].append(rank)
    config = planned[0].config
    shape = engine_shape(config.evaluation, config.dtype, config.trust_remote_code)
    return {
        model: start_engines(model, shape, found, shape.num_engines)
        for model, found in ranks.items()
    }


def _tune(shared: Shared) -> None:
    """Every trial by Ray Tune; returns when all have finished, failed or been stopped."""
    sweep, config = shared.sweep, next(iter(shared.trials.values())).config
    scheduler = None
    if sweep.scheduler is not None:
        asha = sweep.scheduler.asha
        scheduler = ASHAScheduler(
            time_attr="epoch",
            max_t=max(trial.config.epochs for trial in shared.trials.values()),
            grace_period=asha.grace_epochs,
            reduction_factor=asha.reduction_factor,
        )
    trainable = tune.with_parameters(_trial, shared=shared)
    tuner = tune.Tuner(
        # Of CPUs the training below takes its own, which Tune does not count: the limit on trials
        # does. Something must be asked for.
        tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": 1.0}])),
        param_space={"trial": tune.grid_search(list(shared.trials))},
        tune_config=tune.TuneConfig(
            metric="score",
            mode=sweep.select.mode,
            scheduler=scheduler,
            max_concurrent_trials=sweep.max_concurrent or slots(config),
            reuse_actors=scheduler is None,  # what a stopped trial has begun dies with its process
        ),
        run_config=tune.RunConfig(
            name=f"{shared.folder.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(config.work / "tune"),
            verbose=0,
            callbacks=[_Progress(shared)],
        ),
    )
    tuner.fit()


def _end_stopped(shared: Shared) -> None:
    """Say in MLflow which trials the scheduler has stopped."""
    for trial in shared.trials.values():
        if not any(
            _file(shared.folder, trial.id, kind).exists() for kind in ("finished", "failed")
        ):
            run = _open(shared, trial)
            run.tags({"stopped": "early"})
            run.end("KILLED")


def _open(shared: Shared, trial: Trial) -> Run:
    return shared.run.child(key=trial.id, name=f"{trial.label}, seed={trial.seed}")


def slots(config: Config) -> int:
    """How many trials can train at a time beside the engines."""
    free = cluster_resources()
    training, evaluation = config.training, config.evaluation
    cpus = free["CPU"] - evaluation.num_engines * evaluation.num_cpus
    fit = cpus / (training.num_workers * training.cpus_per_worker)
    if training.use_gpu:
        taken = evaluation.num_engines * evaluation.num_gpus * evaluation.tensor_parallel_size
        fit = min(fit, (free["GPU"] - taken) / training.num_workers)
    return max(1, int(fit))


def _trial(params: dict[str, str], shared: Shared) -> None:
    """One transfer of the sweep, in a process of its own."""
    trial = shared.trials[params["trial"]]
    begin, config = time.monotonic(), trial.config
    run = _open(shared, trial)
    inputs = ray.get(shared.inputs[trial.id])
    steps = Steps(config, inputs, quiet=True)
    metric = shared.sweep.metric(config.data.task)
    scored = EpochScore(config, shared.engines, *metric) if shared.sweep.scheduler else None
    try:
        recording.start(run, steps)
        folder = make(steps, run, scored).folder
        evaluation = score_candidates(config, [transferred(config, folder)], shared.engines)
        sweep_recording.finish_trial(run, trial, steps, folder, evaluation)
    except Exception as error:
        said = f"{type(error).__name__}: {getattr(error, 'cause', None) or error}"
        run.tags({"error": said.strip().partition("\n")[0][:500]})
        run.end("FAILED")
        write_json(_file(shared.folder, trial.id, "failed"), {"error": said})
        raise
    _file(shared.folder, trial.id, "failed").unlink(missing_ok=True)
    records = {f"{task}/{split}": str(file) for (_, task, split), file in evaluation.files.items()}
    seconds = time.monotonic() - begin
    write_json(
        _file(shared.folder, trial.id),
        {"seconds": seconds, "folder": str(folder), "records": records},
    )
    score = evaluation.scores[recording.TRANSFERRED, *metric].value
    tune.report({"score": score, "epoch": config.epochs})


@dataclass(frozen=True)
class EpochScore:
    """The score by which the scheduler stops trials, after every epoch, from a training worker."""

    config: Config
    engines: Engines
    task: str
    split: str

    def __call__(self, adapter: Path) -> float:
        settings = self.config.evaluation.model_copy(
            update={"tasks": (self.task,), "splits": (self.split,)}
        )
        config = self.config.model_copy(update={"evaluation": settings})
        candidate = Candidate(name="epoch", model=config.student, adapter=str(adapter))
        evaluation = score_candidates(config, [candidate], self.engines, judge_cpus=0)
        return evaluation.scores["epoch", self.task, self.split].value


class _Progress(tune.Callback):
    """One line a trial that ends."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.done = shared, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        ended = _file(self.shared.folder, trial.config["trial"]).exists()
        what = "" if ended else f", stopped early in epoch {result.get('epoch', 0)}"
        self._say(trial, f"{100 * result.get('score', 0):.1f}{what}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, "failed")

    def _say(self, trial: Any, what: str) -> None:
        self.done += 1
        planned = self.shared.trials[trial.config["trial"]]
        task, split = self.shared.sweep.metric(planned.config.data.task)
        print(
            f"[trial {self.done}/{len(self.shared.trials)}] {planned.label}, seed={planned.seed}: "
            f"{task} {split} {what}",
            flush=True,
        )


def _file(folder: Path, trial: str, kind: str = "finished") -> Path:
    return folder / kind / f"{trial}.json"


def _result(folder: Path, trial: Trial) -> Result:
    """How a trial ended, from its files."""
    if (file := _file(folder, trial.id)).exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        records = {
            (task, split): read_records(Path(path))
            for name, path in found["records"].items()
            for task, _, split in [name.partition("/")]
        }
        return finished(trial, records, found["seconds"], recording.manifest(Path(found["folder"])))
    if (file := _file(folder, trial.id, "failed")).exists():
        return Result(trial=trial, error=json.loads(file.read_text(encoding="utf-8"))["error"])
    return Result(trial=trial)
