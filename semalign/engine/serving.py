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

# Not in the placement group of the process that starts it, which may be a Ray Tune trial's.
ANYWHERE = PlacementGroupSchedulingStrategy(placement_group=None)


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
