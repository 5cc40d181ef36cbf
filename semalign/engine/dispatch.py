"""Engines that answer, sandboxed workers that judge, and the one loop that feeds both.

A dead engine is restarted by Ray and the batches it held are done again; a batch has one result, so
no item is counted twice or lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from tqdm.auto import tqdm

from semalign.artifacts.records import Journal, Record
from semalign.engine.generation import ANYWHERE, LORA_RANKS, EngineShape, start_engine
from semalign.models.loading import load_config, load_tokenizer, resolve
from semalign.models.peft_folder import adapter_fingerprint, adapter_rank
from semalign.stages.scoring import Generation, GenerationRequest, SandboxLimits, judge, requests
from semalign.tasks import TASKS, Example
from semalign.tasks.protocols import Protocol

logger = logging.getLogger(__name__)

_AHEAD = 2  # batches an engine holds, so that it never waits for the driver

Pending = dict[ray.ObjectRef, Callable[[ray.ObjectRef], None]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to score: a base model, or a base model with a LoRA adapter in PEFT's layout.

    `dtype`: to be run in, the evaluation's where it is None.
    """

    name: str
    model: str
    adapter: str | None = None
    dtype: str | None = None


@dataclass(eq=False)
class Unit:
    """The items of one candidate, task and split."""

    candidate: Candidate
    split: str
    examples: list[Example]
    journal: Journal

    @property
    def task(self) -> str:
        return self.examples[0].task

    @property
    def file(self) -> Path:
        return self.journal.file

    @functools.cached_property
    def missing(self) -> list[Example]:
        """The examples without records when the run began."""
        return [self.examples[index] for index in self.journal.missing()]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Some items of a unit."""

    unit: Unit
    examples: list[Example]
    requests: list[GenerationRequest]


def _batches(
    units: Sequence[Unit], tokenizer: Any, shape: EngineShape, protocol: Protocol
) -> list[_Batch]:
    """All batches, code first: its verdicts take longest and can be reached while others run."""
    batches = []
    for unit in sorted(units, key=lambda unit: TASKS[unit.task].kind != "code"):
        asked = requests(unit.missing, tokenizer, protocol, max_model_len=shape.max_model_len)
        if truncated := sum(request.truncated for request in asked):
            logger.warning(
                "%s: the start of %d of %d prompts of %s %s was cut off to fit into %d tokens",
                *(unit.candidate.name, truncated, len(asked), unit.task, unit.split),
                shape.max_model_len,
            )
        for start in range(0, len(asked), shape.batch_items):
            part = slice(start, start + shape.batch_items)
            batches.append(_Batch(unit, unit.missing[part], asked[part]))
    return batches


@ray.remote(max_retries=3)
def _judge(
    examples: list[Example],
    asked: list[GenerationRequest],
    generations: list[Generation],
    split: str,
    protocol: Protocol,
    sandbox: SandboxLimits,
) -> list[Record]:
    return judge(examples, asked, generations, split=split, protocol=protocol, sandbox=sandbox)


def dispatch(
    units: list[Unit],
    shape: EngineShape,
    sandbox: SandboxLimits,
    protocol: Protocol,
    engines: Mapping[str, Sequence[Any]],
) -> None:
    """Generate and judge all units, handling whatever is done next: a generation or a verdict.

    ``engines`` are those that run already, by model; what is missing is started, and ended.
    """
    total = sum(len(unit.missing) for unit in units)
    pending: Pending = {}
    quiet = ray.get_runtime_context().get_actor_id() is not None  # not the driver's terminal
    with contextlib.ExitStack() as stack:
        bars = {
            name: stack.enter_context(
                tqdm(total=total, desc=name, unit="item", position=line, disable=quiet)
            )
            for line, name in enumerate(("generate", "judge"))
        }
        for model, dtype in dict.fromkeys(_run_as(unit, shape) for unit in units):
            served = [unit for unit in units if _run_as(unit, shape) == (model, dtype)]
            shared = engines.get(model, ()) if dtype == shape.dtype else ()
            own = dataclasses.replace(shape, dtype=dtype)
            group = _Engines(model, served, own, sandbox, protocol, pending, bars, shared)
            stack.callback(group.close)
            group.feed()
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            pending.pop(done[0])(done[0])


def _run_as(unit: Unit, shape: EngineShape) -> tuple[str, str]:
    """The model of a unit's engines, and the dtype that they run it in."""
    return unit.candidate.model, unit.candidate.dtype or shape.dtype


def fitted(shape: EngineShape, model: str) -> EngineShape:
    """The shape with no more context than the model has."""
    config = load_config(model, trust_remote_code=shape.trust_remote_code).get_text_config()
    length = min(shape.max_model_len, config.max_position_embeddings)
    return dataclasses.replace(shape, max_model_len=length)


def start_engines(model: str, shape: EngineShape, ranks: Sequence[int], number: int) -> list[Any]:
    """Engines of a base model, with room for one adapter of any of these ranks at a time."""
    room = next(rank for rank in LORA_RANKS if rank >= max(ranks)) if ranks else None
    path, shape = str(resolve(model)), fitted(shape, model)
    print(f"[engines] {number} for {model}, {shape.dtype}, LoRA rank up to {room or 0}", flush=True)
    return [start_engine(path, shape, room) for _ in range(number)]


def stop_engines(engines: Iterable[Any]) -> None:
    for engine in engines:
        ray.kill(engine)


class _Engines:
    """The engines of one base model, the batches that wait for them, and those under way.

    Engines that do not fit the cluster yet are started by Ray when others have ended.
    """

    def __init__(
        self,
        model: str,
        units: Sequence[Unit],
        shape: EngineShape,
        sandbox: SandboxLimits,
        protocol: Protocol,
        pending: Pending,
        bars: dict[str, Any],
        shared: Sequence[Any],
    ) -> None:
        self.model, self.sandbox, self.protocol = model, sandbox, protocol
        self.pending, self.bars = pending, bars
        shape = fitted(shape, model)
        tokenizer = load_tokenizer(model, trust_remote_code=shape.trust_remote_code)
        self.waiting = deque(_batches(units, tokenizer, shape, protocol))
        self.adapters = {
            folder: (str(Path(folder).resolve()), adapter_fingerprint(folder))
            for unit in units
            if (folder := unit.candidate.adapter)
        }
        self.shared = bool(shared)
        if not shared:
            ranks = [adapter_rank(folder) for folder in self.adapters]
            number = min(shape.num_engines, len(self.waiting))
            shared = start_engines(model, shape, ranks, number)
        self.load = dict.fromkeys(shared, 0)

    def feed(self) -> None:
        """Give waiting batches to the idlest engines; end the engines after the last batch."""
        while self.waiting:
            engine = min(self.load, key=self.load.__getitem__)
            if self.load[engine] == _AHEAD:
                return
            batch = self.waiting.popleft()
            adapter = self.adapters.get(batch.unit.candidate.adapter or "")
            generated = engine.generate.remote(batch.requests, adapter)
            self.load[engine] += 1
            self.pending[generated] = partial(self._generated, engine, batch)
        if not any(self.load.values()):
            self.close()

    def _generated(self, engine: Any, batch: _Batch, generated: ray.ObjectRef) -> None:
        self.load[engine] -= 1
        self.bars["generate"].update(len(batch.requests))
        items = batch.examples, batch.requests, generated
        judge = _judge.options(scheduling_strategy=ANYWHERE, num_cpus=self.sandbox.num_cpus)
        judged = judge.remote(*items, batch.unit.split, self.protocol, self.sandbox)
        self.pending[judged] = partial(self._judged, batch)
        self.feed()

    def _judged(self, batch: _Batch, judged: ray.ObjectRef) -> None:
        try:
            records = ray.get(judged)
        except RayActorError as error:
            raise RuntimeError(
                f"the engine of {self.model} died more often than evaluation.max_restarts allows, "
                f"last with {batch.unit.task} {batch.unit.split} from {batch.examples[0].id} on"
            ) from error
        batch.unit.journal.add(records)
        self.bars["judge"].update(len(batch.requests))

    def close(self) -> None:
        if not self.shared:
            stop_engines(self.load)
        self.load = {}
