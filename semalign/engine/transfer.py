"""One transfer, end to end: its artifacts, then evaluation, the MLflow run and the final table."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from semalign.artifacts.artifact import Workspace, union
from semalign.artifacts.host import Observer
from semalign.artifacts.local import Executor, LocalExecutor, Timer, make_all
from semalign.config.jobs import Config
from semalign.data.root import data_root
from semalign.engine import recording
from semalign.engine.evaluation import Scored, wanted_records
from semalign.engine.limits import check_engines
from semalign.engine.scoring import base_candidates, score_candidates, transferred
from semalign.engine.tracking import Run, recorded
from semalign.files import check_writable, naming_full_disk
from semalign.methods.method import Recipe, Transfer, bytes_to_write, method_of
from semalign.plan import plan_transfer
from semalign.stages.judged import Records, engine_bytes

if TYPE_CHECKING:  # Ray, which a local run needs not have
    from semalign.engine.serving import Engines


@dataclass(frozen=True)
class FinishedTransfer:
    """What a transfer leaves: its effective configuration, folder, MLflow run and scores."""

    config: Config
    folder: Path
    run_id: str
    scored: Scored


def run_transfer(
    config: Config, *, local: bool = False, engines: Engines | None = None
) -> FinishedTransfer:
    """Run, or finish, the transfer that the configuration describes, and print its table.

    A finished transfer is not run again: every artifact is found, and its MLflow run is left as it
    is. `local`: in this process, without Ray. `engines` that run already are used and left running.
    Raises UserError for bad input, and Diverged when the loss is no longer finite.
    """
    prepared = Transfer.of(config)
    check_engines([prepared])
    workspace = Workspace(config.work)
    prepared.check_room(workspace)
    check_writable(config.work)
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            naming_full_disk(config.work, lambda: bytes_to_write([prepared], workspace))
        )
        if not local:
            from semalign.engine.cluster import check_resources, cluster_resources, connect

            stack.enter_context(connect(config.cluster.address))
            check_resources(prepared.config, cluster_resources())
        name = run_name(prepared.config)
        run = stack.enter_context(recorded(config, key=prepared.key, name=name, local=local))
        if not local and engines is None:
            from semalign.engine.serving import Engines

            engines = stack.enter_context(Engines())
        return _run(prepared, run, engines)


def _run(prepared: Transfer, run: Run, engines: Engines | None) -> FinishedTransfer:
    config, timer = prepared.config, Timer()
    workspace, local = Workspace(config.work), engines is None
    finished = run.is_finished()
    if not finished:
        recording.start(run, prepared)
        if engines is not None:
            _start_engines(prepared, workspace, engines)
    observe = recording.EpochRecorder(run)
    with _executor(config, workspace, timer, observe, local) as executor:
        recipe = make(prepared, executor)
    folder = workspace.place(recipe.result)
    recording.describe(folder, config)
    candidates = [*base_candidates(prepared), transferred(prepared, folder)]
    running = engines.running if engines else None
    scored = score_candidates(config, candidates, running, local=local)
    tier = recording.sandbox_tier(scored)
    notes = [f"{scored.generated} items generated", f"sandbox tier {tier}"]
    timer.report("evaluate", scored.seconds, notes)
    recording.write_scores(folder, config, scored)
    if not finished:
        begin = time.monotonic()
        recording.finish(run, prepared, recipe, scored, timer)
        timer.report("record", time.monotonic() - begin, ["figures, report, MLflow"])
    recording.point_latest(folder)
    recording.show(config, scored, folder, run)
    return FinishedTransfer(config, folder, run.run_id, scored)


def _start_engines(prepared: Transfer, workspace: Workspace, engines: Engines) -> None:
    """Start the engines that will answer while the stages run, if there is room for both."""
    from semalign.engine.cluster import holds_all

    config, settings = prepared.config, prepared.config.evaluation
    bare = base_candidates(prepared)
    root = data_root(settings.root or config.data.root)
    wanted = wanted_records(bare, settings, root)
    unanswered = {name for (name, *_), made in wanted.items() if not workspace.has(made)}
    rank = prepared.method.rank(config)
    ranks = {"student": [rank]} if rank is not None else {}
    models = {c.name: c.model for c in bare if c.name in unanswered or c.name in ranks}
    steps = [s for s in plan_transfer(prepared, workspace).steps if s.stage != Records.stage]
    if models and holds_all(
        config, steps, [engine_bytes(m.bytes, settings) for m in models.values()]
    ):
        for name, model in models.items():
            engines.start(model, settings, ranks.get(name, []))


@contextlib.contextmanager
def _executor(
    config: Config, workspace: Workspace, timer: Timer, observe: Observer, local: bool
) -> Iterator[Executor]:
    if local:
        device = "cuda" if config.training.use_gpu or config.extraction.num_gpus else "cpu"
        yield LocalExecutor(workspace, timer=timer, device=device, observe=observe)
        return
    from semalign.engine.executor import RayExecutor

    with RayExecutor(config, workspace, timer=timer, observe=observe) as executor:
        yield executor


def make(prepared: Transfer, executor: Executor, *, quiet: bool = False) -> Recipe:
    """Make everything of a transfer, or find it made; returns what there is.

    `quiet`: the pairs are not printed.
    """
    make_all(executor, prepared.first)
    recipe = prepared.recipe(executor.workspace)
    for pair in () if quiet else recipe.pairs:
        print(f"[pair] {prepared.config.pairing.strategy}; {pair}", flush=True)
    needed = union(recipe.artifacts)[len(prepared.first) :]
    executor.workspace.check_room(needed)
    make_all(executor, needed)
    return recipe


def run_name(config: Config) -> str:
    """What is trained on, and how."""
    return f"{config.data.task}-{method_of(config).run_name(config)}"
