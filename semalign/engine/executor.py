"""Making artifacts on a Ray cluster: model workers, a pool of them for extraction, Ray Train.

A worker process holds a model as long as artifacts are made from it, so that it is loaded once, and
lets it go for the next: one process serves all stages. The models that are in memory at a time are
those that are needed together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util import ActorPool

from semalign.artifacts.activations import Column
from semalign.artifacts.artifact import Artifact, Json, Workspace
from semalign.artifacts.host import Host, Observer
from semalign.artifacts.local import Timer
from semalign.config.jobs import AnalysisJob, Config
from semalign.engine.serving import ANYWHERE
from semalign.errors import Failed, UserError, root_cause
from semalign.stages.extraction import Activations
from semalign.stages.update import Update


class ModelWorker:
    """Makes artifacts in a process of its own, with the models that it holds."""

    def __init__(self, workspace: Workspace, threads: int, device_map: str | None) -> None:
        import torch

        torch.set_num_threads(threads)
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self._host = Host(workspace, device=device, device_map=device_map)
        self._held: dict[str, Any] = {}

    def make(self, artifact: Artifact, folder: Path) -> Mapping[str, Json]:
        return artifact.make(folder, self._host)

    def make_shard(
        self, key: str, placed: Sequence[Any], folder: Path, shard: int, columns: list[Column]
    ) -> int:
        """Write one shard. `placed` holds a reference to the artifact, fetched once a process."""
        if key not in self._held:
            artifact = ray.get(placed[0])
            self._held = {key: (artifact, artifact.open(folder))}
        artifact, store = self._held[key]
        artifact.make_shard(store, shard, columns, self._host)
        return shard


class RayExecutor:
    """Makes artifacts on the cluster that this process has joined.

    A training with one worker and no GPU runs in this process, others under Ray Train; `observe` is
    called after every epoch; where a Ray Tune trial `reports`, it returns the trial's score. Use it
    as a context: the workers end with it.
    """

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        *,
        timer: Timer | None = None,
        observe: Observer | None = None,
        reports: bool = False,
    ) -> None:
        self.config, self.workspace = config, workspace
        self.observe, self.reports = observe, reports
        self.timer = timer or Timer()
        self._models: tuple[str, ...] = ()
        self._workers: list[Any] = []

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and free what they hold."""
        self._keep(0)
        self._models = ()

    def _keep(self, number: int) -> None:
        """End all workers but so many."""
        while len(self._workers) > number:
            ray.kill(self._workers.pop())

    def make(self, artifact: Artifact) -> Path:
        return self.timer.run(self.workspace, artifact, partial(self._make, artifact))

    def _make(self, artifact: Artifact, folder: Path) -> Mapping[str, Json]:
        if isinstance(artifact, Update):
            self.close()  # a training needs what the workers hold
            return self._train(artifact, folder)
        if isinstance(artifact, Activations):
            return self._extract(artifact, folder)
        [worker] = self._started(artifact, 1)
        return fetch(worker.make.remote(artifact, folder))

    def _train(self, update: Update, folder: Path) -> Mapping[str, Json]:
        if trains_here(self.config):
            with threads(self.config.training.cpus_per_worker):
                return update.make(folder, Host(self.workspace, observe=self.observe))
        from semalign.engine.train_worker import fit

        checkpoint = fit(update, self.config, self.workspace, self.observe, reports=self.reports)
        return update.publish(checkpoint, folder)

    def _extract(self, wanted: Activations, folder: Path) -> Mapping[str, Json]:
        """All missing shards, each a call of one of the workers that can be made again."""
        store = wanted.open(folder)
        todo = store.missing(wanted.columns)
        workers = self._started(wanted, min(self.config.extraction.num_actors, len(todo)))
        pool, placed = ActorPool(workers), [ray.put(wanted)]

        def call(worker: Any, item: tuple[int, list[Column]]) -> ray.ObjectRef:
            return worker.make_shard.remote(wanted.key, placed, folder, *item)

        for item in todo.items():
            pool.submit(call, item)
        while pool.has_next():
            _unwrapped(pool.get_next_unordered)
        store.commit(wanted.columns)
        return {}

    def _started(self, artifact: Artifact, number: int) -> list[Any]:
        """So many workers for the artifact's models, those that run already among them."""
        models = tuple(model.path for model in artifact.models)
        if models and models != self._models:
            self._keep(1)  # it lets its models go when it loads others
        self._models = models or self._models
        settings = self.config.extraction
        actor = ray.remote(ModelWorker).options(
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            scheduling_strategy=ANYWHERE,
            max_restarts=settings.max_restarts,
            max_task_retries=settings.max_restarts,
        )
        cores = max(1, math.floor(settings.num_cpus))
        while len(self._workers) < number:
            self._workers.append(actor.remote(self.workspace, cores, settings.device_map))
        return self._workers[:number]


def make_alone(
    artifact: Artifact, workspace: Workspace, resources: AnalysisJob, folder: Path
) -> Mapping[str, Json]:
    """Make one artifact in a worker of these resources, which ends with it."""
    actor = ray.remote(ModelWorker).options(
        num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, max_restarts=2, max_task_retries=2
    )
    cores = max(1, math.floor(resources.num_cpus))
    worker = actor.remote(workspace, cores, resources.device_map)
    try:
        return fetch(worker.make.remote(artifact, folder))
    finally:
        ray.kill(worker)


@contextmanager
def threads(cpus: float) -> Iterator[None]:
    """Within the context torch computes with as many threads as there are whole CPUs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, math.floor(cpus)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trains_here(config: Config) -> bool:
    """Whether a training needs no process of its own: the same loop, without Ray Train's cost."""
    return config.training.num_workers == 1 and not config.training.use_gpu


def fetch(reference: ray.ObjectRef) -> Any:
    """The value; of an error in a worker that people can act on, the error itself."""
    return _unwrapped(partial(ray.get, reference))


def _unwrapped(call: Any) -> Any:
    try:
        return call()
    except (UserError, Failed) as error:  # Ray raises them wrapped in the worker's traceback
        raise root_cause(error) from None
