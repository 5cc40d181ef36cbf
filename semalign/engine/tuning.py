"""A sweep on Ray Tune: what trials share is made once, each is trained and scored, all compared.

Attributions, stores and maps are made before the first trial and found by path; the vLLM engines
are started once and handed to every trial. A trial that has its result file is not run again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from semalign.artifacts.files import content_key
from semalign.config.jobs import Config
from semalign.core.statistics import Score
from semalign.engine import sweep_recording
from semalign.engine.cluster import check_sweep, cluster_resources, connect, held_gpus
from semalign.engine.dispatch import start_engines, stop_engines
from semalign.engine.evaluation import Candidate
from semalign.engine.methods import prepare_whole
from semalign.engine.scoring import engine_shape, score_candidates
from semalign.engine.steps import Need, Steps
from semalign.engine.tracking import Run, recorded
from semalign.engine.trial import (
    Engines,
    Shared,
    is_done,
    open_run,
    result,
    run_trial,
    stop,
)
from semalign.errors import Failed
from semalign.stages.inputs import Inputs, check_writable
from semalign.stages.trial_plan import contents, share_inputs
from semalign.sweep.file import Sweep
from semalign.sweep.search import Point, load_optuna, suggest
from semalign.sweep.summary import Key, Result, Summary, summarise
from semalign.sweep.trials import Trial, extremes, make_trial, references, trials


def ablate(sweep: Sweep, *, yes: bool = False) -> Summary:
    """Run, or finish, a sweep and print its tables.

    A trial that fails does not stop the others. Raises UserError for bad input, and Failed if no
    trial finishes.
    """
    planned = trials(sweep, yes=yes)
    possible = planned
    if sweep.search == "optuna":
        load_optuna()
        possible = extremes(sweep)
    inputs = share_inputs(possible)
    config = planned[0].config
    check_writable(config.work)
    how = sweep.model_dump(mode="json", include={"select", "report", "compare", "search"})
    ids = [trial.id for trial in planned]
    key = content_key(sweep.name, ids, how, contents(possible, inputs))
    folder = config.work / "sweeps" / f"{sweep.name}-{key}"
    with connect(config.cluster.address):
        compared = sweep.compare is not None
        check_sweep([t.config for t in possible], cluster_resources(), compared=compared)
        with recorded(config, key=key, name=sweep.name) as run:
            summary = _run(sweep, planned, possible, inputs, run, folder)
            sweep_recording.finish(run, summary, folder)
            sweep_recording.show(summary, folder, config, run)
            if not any(result.state == "finished" for result in summary.results):
                raise Failed(f"sweep {sweep.name}: no trial finished; see {folder}/report.md")
    return summary


def _run(
    sweep: Sweep,
    planned: Sequence[Trial],
    possible: Sequence[Trial],
    inputs: Mapping[str, Inputs],
    run: Run,
    folder: Path,
) -> Summary:
    begin = time.monotonic()
    engines: Engines = {}
    tried: dict[str, Trial] = {}
    try:
        for batch in _rounds(sweep, planned, folder):
            for trial in batch:
                tried.setdefault(trial.id, trial)  # a suggestion may be the base
            todo = [trial for trial in batch if not is_done(folder, trial, sweep)]
            before = len(batch) - len(todo)
            print(f"[sweep] {len(batch)} trials, {before} finished before", flush=True)
            if todo:
                engines = engines or _start_engines(possible)
                known = {**inputs, **share_inputs([t for t in todo if t.id not in inputs])}
                prepare(todo, known)
                shared = Shared(
                    sweep=sweep,
                    trials={trial.id: trial for trial in todo},
                    inputs=_put(known, todo),
                    run=run,
                    engines=engines,
                    folder=folder,
                )
                _tune(shared, slots([trial.config for trial in possible]))
        # last: the engines start while the first trials train
        compared = sweep.compare is not None
        config, models = references(planned, compared=compared)
        beside = [Candidate(name=m if compared else "student", model=m) for m in models]
        found = score_candidates(config, beside, engines).scores
    finally:
        for group in engines.values():
            stop_engines(group)
    print(f"[sweep] {time.monotonic() - begin:.1f} s", flush=True)
    scores: dict[str, dict[Key, Score]] = {}
    for (name, task, split), score in found.items():
        scores.setdefault(name, {})[task, split] = score
    results = [result(folder, trial, sweep) for trial in tried.values()]
    _end_others(run, results)
    return summarise(sweep, results, scores)


def _rounds(sweep: Sweep, planned: Sequence[Trial], folder: Path) -> Iterator[list[Trial]]:
    """The trials as they become known: all at once, or the base's and then what is suggested, a
    few points at a time, each with every seed, from the mean scores of those before.
    """
    if sweep.search != "optuna":
        yield list(planned)
        return
    yield [make_trial(sweep, {}, seed) for seed in sweep.seeds]
    scored: list[tuple[Point, float | None]] = []
    while points := suggest(sweep, scored):
        groups = [[make_trial(sweep, point, seed) for seed in sweep.seeds] for point in points]
        yield [trial for group in groups for trial in group]
        for point, group in zip(points, groups, strict=True):
            results = [result(folder, trial, sweep) for trial in group]
            found = [
                r.score(sweep.metric(r.trial.config.data.task))
                for r in results
                if r.state == "finished"
            ]
            scored.append((point, statistics.fmean(found) if found else None))


def prepare(planned: Sequence[Trial], inputs: Mapping[str, Inputs]) -> None:
    """Attribute, extract and so on once for all trials, which then find it done."""
    needs: dict[Path, tuple[Steps, Need]] = {}
    for trial in planned:
        steps = Steps(trial.config, inputs[trial.id], quiet=True)
        if not trial.config.pairs_layers:
            prepare_whole(steps)
            continue
        pairs = steps.pair(steps.attribute())
        steps.align()
        for need in filter(lambda need: need.columns, steps.needs(pairs)):
            path = steps.store_path(need)
            columns = need.columns | (needs[path][1].columns if path in needs else frozenset())
            needs[path] = steps, replace(need, columns=columns)
    for steps, need in needs.values():
        steps.fill(need)


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
    # they mostly wait for trials: trainings take their CPUs meanwhile
    shape = replace(shape, holds_cpus=False)
    return {
        model: start_engines(model, shape, found, shape.num_engines)
        for model, found in ranks.items()
    }


def _tune(shared: Shared, together: int) -> None:
    """Every trial by Ray Tune, so many at a time; returns when all have finished, failed or been
    stopped.
    """
    sweep, config = shared.sweep, next(iter(shared.trials.values())).config
    scheduler = None
    if sweep.scheduler is not None:
        asha = sweep.scheduler.asha
        scheduler = ASHAScheduler(
            time_attr="epoch",
            max_t=max(asha.grace_epochs, *(t.config.epochs for t in shared.trials.values())),
            grace_period=asha.grace_epochs,
            reduction_factor=asha.reduction_factor,
        )
    trainable = tune.with_parameters(run_trial, shared=shared)
    tuner = tune.Tuner(
        # Of CPUs the training below takes its own, which Tune does not count: the limit on trials
        # does. Something must be asked for.
        tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": 1.0}])),
        param_space={"trial": tune.grid_search(list(shared.trials))},
        tune_config=tune.TuneConfig(
            metric="score",
            mode=sweep.select.mode,
            scheduler=scheduler,
            max_concurrent_trials=sweep.max_concurrent or together,
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


def _end_others(run: Run, results: Sequence[Result]) -> None:
    """Say in MLflow which trials failed, and which the scheduler stopped."""
    for found in results:
        if found.state == "finished":
            continue
        own = open_run(run, found.trial)
        if found.error is None:
            own.tags({"stopped": "early"})
            own.end("KILLED")
        else:
            own.tags({"error": found.error.strip().partition("\n")[0][:500]})
            own.end("FAILED")


def slots(configs: Sequence[Config]) -> int:
    """How many trials run at a time: as many as can train, and on GPUs one more, that starts or is
    scored meanwhile.

    The engines hold no CPU, for they mostly wait; what they hold of the GPUs is not for training.
    """
    free, training = cluster_resources(), configs[0].training
    fit = free["CPU"] / (training.num_workers * training.cpus_per_worker)
    if not training.use_gpu:
        return max(1, int(fit))
    return max(1, int(min(fit, (free["GPU"] - held_gpus(configs)) / training.num_workers))) + 1


class _Progress(tune.Callback):
    """One line a trial that ends."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.done = shared, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        planned, reported = self.shared.trials[trial.config["trial"]], trial.last_result
        said = f"{100 * reported['score']:.1f}"
        if reported["epoch"] < planned.config.epochs:  # the last is the trial's own report
            stop(self.shared.folder, planned, self.shared.sweep, reported)
            said += f", stopped early after epoch {reported['epoch']}"
        self._say(trial, said)

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
