"""A sweep on Ray Tune: what trials share is made once, each is trained and scored, all compared.

Attributions, stores and maps are made before the first trial and found by path; the vLLM engines
are started once and handed to every trial. A trial that has its result file is not run again.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from semalign.artifacts.artifact import Artifact, Workspace, union
from semalign.artifacts.local import Timer, make_all
from semalign.config.jobs import Config
from semalign.core.statistics import Score
from semalign.engine import sweep_recording
from semalign.engine.cluster import check_sweep, cluster_resources, connect, held_gpus
from semalign.engine.executor import RayExecutor, trains_here
from semalign.engine.limits import check_engines
from semalign.engine.scoring import open_model, score_candidates
from semalign.engine.serving import Engines
from semalign.engine.tracking import Run, recorded
from semalign.engine.trial import (
    Shared,
    is_done,
    open_run,
    report,
    result,
    run_trial,
    stop,
)
from semalign.errors import Failed
from semalign.files import check_writable, content_key, naming_full_disk
from semalign.methods.method import Transfer, bytes_to_write, method_of
from semalign.models.reference import Model
from semalign.names import file_name
from semalign.stages.judged import Candidate, Served, served
from semalign.sweep.file import Sweep
from semalign.sweep.search import Point, load_optuna, suggest
from semalign.sweep.summary import MetricKey, Result, Summary, summarise
from semalign.sweep.transfers import contents, transfers
from semalign.sweep.trials import Trial, extremes, make_trial, references, trials


def ablate(sweep: Sweep, *, yes: bool = False, engines: Engines | None = None) -> Summary:
    """Run, or finish, a sweep and print its tables.

    A trial that fails does not stop the others. `engines` that run already are used and left
    running. Raises UserError for bad input, and Failed if no trial finishes.
    """
    planned = trials(sweep, yes=yes)
    possible = planned
    if sweep.search == "optuna":
        load_optuna()
        possible = extremes(sweep)
    known = transfers(possible)
    check_engines(known.values())
    config = planned[0].config
    check_writable(config.work)
    how = sweep.model_dump(mode="json", include={"select", "report", "compare", "search"})
    ids = [trial.id for trial in planned]
    key = content_key(sweep.name, ids, how, contents(known))
    folder = config.work / "sweeps" / f"{file_name(sweep.name)}-{key}"
    workspace = Workspace(config.work)
    with (
        naming_full_disk(config.work, lambda: bytes_to_write(known.values(), workspace)),
        connect(config.cluster.address),
    ):
        compared = sweep.compare is not None
        check_sweep([t.config for t in possible], cluster_resources(), compared=compared)
        with recorded(config, key=key, name=sweep.name) as run:
            with contextlib.nullcontext(engines) if engines else Engines() as held:
                summary = _run(sweep, planned, possible, known, run, held, folder)
            sweep_recording.finish_sweep(run, summary, folder)
            sweep_recording.show_sweep(summary, folder, config, run)
            if not any(result.state == "finished" for result in summary.results):
                raise Failed(f"sweep {sweep.name}: no trial finished; see {folder}/report.md")
    return summary


def _run(
    sweep: Sweep,
    planned: Sequence[Trial],
    possible: Sequence[Trial],
    known: Mapping[str, Transfer],
    run: Run,
    engines: Engines,
    folder: Path,
) -> Summary:
    begin = time.monotonic()
    tried: dict[str, Trial] = {}
    for batch in _rounds(sweep, planned, folder):
        for trial in batch:
            tried.setdefault(trial.id, trial)  # a suggestion may be the base
        todo = [trial for trial in batch if not is_done(folder, trial, sweep)]
        before = len(batch) - len(todo)
        print(f"[sweep] {len(batch)} trials, {before} finished before", flush=True)
        if todo:
            _start_engines(possible, known, engines)
            known = {**known, **transfers([t for t in todo if t.id not in known])}
            prepare([known[trial.id] for trial in todo])
            shared = Shared(
                sweep=sweep,
                trials={trial.id: trial for trial in todo},
                inputs=_put(known, todo),
                run=run,
                engines=engines.running,
                folder=folder,
            )
            _tune(shared, slots([trial.config for trial in possible]))
    reported = _report(sweep, tried, known, run, engines, folder)
    # last: the engines start while the first trials train
    compared = sweep.compare is not None
    config, models = references(planned, compared=compared)
    bare = [
        Candidate(name=m if compared else "student", model=open_model(config, m)) for m in models
    ]
    found = score_candidates(config, bare, engines.running).scores
    print(f"[sweep] {time.monotonic() - begin:.1f} s", flush=True)
    scores: dict[str, dict[MetricKey, Score]] = {}
    for (name, task, split), score in found.items():
        scores.setdefault(name, {})[task, split] = score
    results = [
        result(folder, trial, sweep, reported=trial.id in reported) for trial in tried.values()
    ]
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


def _report(
    sweep: Sweep,
    tried: Mapping[str, Trial],
    known: Mapping[str, Transfer],
    run: Run,
    engines: Engines,
    folder: Path,
) -> set[str]:
    """Score the base and the setting that is chosen on the report split, now that it is known which
    that is; the ids of their trials.
    """
    summary = summarise(sweep, [result(folder, trial, sweep) for trial in tried.values()])
    if summary.chosen is None:
        return set()
    shown = [setting for setting in (summary.base, summary.chosen) if setting is not None]
    finished = {found.trial.id: found.trial for setting in shown for found in setting.finished}
    known = {**known, **transfers([t for t in finished.values() if t.id not in known])}
    for trial in finished.values():
        report(trial, known[trial.id], sweep, run, engines.running, folder)
    return set(finished)


def prepare(wanted: Sequence[Transfer]) -> None:
    """Make once what several trials need; they then find it."""
    config = wanted[0].config
    workspace = Workspace(config.work)
    with RayExecutor(config, workspace, timer=Timer(quiet=True)) as executor:
        make_all(executor, by_models(union(a for transfer in wanted for a in transfer.first)))
        recipes = [transfer.recipe(workspace) for transfer in wanted]
        workspace.check_room(union(a for recipe in recipes for a in recipe.artifacts))
        shared = union(a for recipe in recipes for a in recipe.artifacts[:-1])
        make_all(executor, by_models(shared))


def by_models(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Those of the same models together, so that each is loaded once; last those of none."""
    order = list(dict.fromkeys(tuple(m.path for m in a.models) for a in artifacts))
    with_models = [models for models in order if models]
    places = {models: place for place, models in enumerate([*with_models, ()])}
    return sorted(artifacts, key=lambda a: places[tuple(m.path for m in a.models)])


def _put(known: Mapping[str, Transfer], planned: Sequence[Trial]) -> dict[str, Any]:
    """Inputs in Ray's store, those that are equal once however many trials have them."""
    placed: dict[int, Any] = {}
    found = {}
    for trial in planned:
        inputs = known[trial.id].inputs
        if id(inputs) not in placed:
            placed[id(inputs)] = ray.put(inputs)
        found[trial.id] = placed[id(inputs)]
    return found


def _start_engines(
    planned: Sequence[Trial], known: Mapping[str, Transfer], engines: Engines
) -> None:
    """The engines of every student that adapters are trained for, with room for the largest."""
    ranks: dict[Served, list[int]] = {}
    models: dict[Served, Model] = {}
    for trial in planned:
        student = known[trial.id].inputs.student
        models[served(student)] = student
        held = ranks.setdefault(served(student), [])
        if (rank := method_of(trial.config).rank(trial.config)) is not None:
            held.append(rank)
    for key, model in models.items():
        engines.start(model, planned[0].config.evaluation, ranks[key])


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
            max_t=max(asha.grace_epochs, *(epochs(t.config) for t in shared.trials.values())),
            grace_period=asha.grace_epochs,
            reduction_factor=asha.reduction_factor,
        )
    trainable = tune.with_parameters(run_trial, shared=shared)
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([_resources(config)])),
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
    results = tuner.fit()  # which returns after an interrupt as if it had ended
    if results.num_terminated + results.num_errors < len(shared.trials):
        raise KeyboardInterrupt


def _resources(config: Config) -> dict[str, float]:
    """Of a trial's own process. Where Ray Train starts workers, they take theirs, which Tune does
    not count (the limit on trials does); something must be named.
    """
    return {"CPU": config.training.cpus_per_worker} if trains_here(config) else {"memory": 1.0}


def epochs(config: Config) -> int:
    """How many a trial reports; of an effective configuration."""
    assert config.training.epochs is not None
    return config.training.epochs


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
        text = f"{100 * reported['score']:.1f}"
        if reported["epoch"] < epochs(planned.config):  # the last is the trial's own report
            stop(self.shared.folder, planned, self.shared.sweep, reported)
            text += f", stopped early after epoch {reported['epoch']}"
        self._report(trial, text)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._report(trial, "failed")

    def _report(self, trial: Any, what: str) -> None:
        self.done += 1
        planned = self.shared.trials[trial.config["trial"]]
        task, split = self.shared.sweep.metric(planned.config.data.task)
        print(
            f"[trial {self.done}/{len(self.shared.trials)}] {planned.label}, seed={planned.seed}: "
            f"{task} {split} {what}",
            flush=True,
        )
