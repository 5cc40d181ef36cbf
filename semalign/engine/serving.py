"""Engines as Ray actors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from semalign.config.sections import Evaluation
from semalign.engine.vllm_engine import ENGINE_ENVIRONMENT, Engine, lora_room
from semalign.models.loading import model_folder
from semalign.models.reference import Model
from semalign.stages.judged import Served, served

# Not in the placement group of the process that starts it, which may be a Ray Tune trial's.
ANYWHERE = PlacementGroupSchedulingStrategy(placement_group=None)


# The settings that an engine is started by.
_SETTINGS = (
    *("num_engines", "num_cpus", "num_gpus", "tensor_parallel_size", "max_restarts"),
    *("max_model_len", "kv_cache_gb"),
)


class Engines:
    """Engines that run until the end of this context, for one job or for several.

    They mostly wait, and hold no CPUs: stages and trainings have them meanwhile. `running` has the
    handles of each base model's, which any process of the cluster can call.
    """

    def __init__(self) -> None:
        self.running: dict[Served, list[Any]] = {}
        self._started: dict[Served, tuple[Any, int]] = {}  # by what, with room for which rank

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        for group in self.running.values():
            stop_engines(group)
        self.running, self._started = {}, {}

    def start(self, model: Model, settings: Evaluation, ranks: Sequence[int]) -> None:
        """Start those of a base model, with room for adapters of these ranks, unless they run."""
        key, room = served(model), lora_room(ranks) or 0
        wanted = model.identity, settings.model_dump(include=set(_SETTINGS))
        if key in self._started:
            before, had = self._started[key]
            if before == wanted and had >= room:
                return
            stop_engines(self.running.pop(key))
        self._started[key] = wanted, room
        self.running[key] = start_engines(
            model, settings, ranks, settings.num_engines, holds_cpus=False
        )


def start_engines(
    model: Model,
    settings: Evaluation,
    ranks: Sequence[int],
    number: int,
    *,
    holds_cpus: bool = True,
) -> list[Any]:
    """Handles of engines of a base model, with room for one adapter of any of these ranks at a
    time.

    A dead engine is restarted up to `max_restarts` times and the calls it held are made again.
    Without `holds_cpus` they use their CPUs without keeping others from them.
    """
    room, folder = lora_room(ranks), str(model_folder(model.path))
    print(
        f"[engines] {number} for {model.path}, {model.dtype}, LoRA rank up to {room or 0}",
        flush=True,
    )
    threads = str(max(1, math.floor(settings.num_cpus)))
    actor = ray.remote(Engine).options(
        num_cpus=settings.num_cpus if holds_cpus else 0,
        num_gpus=settings.num_gpus * settings.tensor_parallel_size,
        # what holds nothing would all be put on one node
        scheduling_strategy=ANYWHERE if holds_cpus else "SPREAD",
        max_restarts=settings.max_restarts,
        max_task_retries=settings.max_restarts,
        runtime_env={"env_vars": {**ENGINE_ENVIRONMENT, "OMP_NUM_THREADS": threads}},
    )
    return [actor.remote(folder, model, settings, room) for _ in range(number)]


def stop_engines(engines: Iterable[Any]) -> None:
    for engine in engines:
        ray.kill(engine)
