"""Engines that answer, workers that judge by running code, and the one loop that feeds both.

A dead engine is restarted by Ray and the batches it held are done again; a batch has one result, so
no item is counted twice or lost.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError
from tqdm.auto import tqdm

from semalign.artifacts.records import Record
from semalign.config.sections import Evaluation, Sandbox
from semalign.engine.serving import ANYWHERE, start_engines, stop_engines
from semalign.errors import Failed, one_line, root_cause
from semalign.models.peft_folder import adapter_rank
from semalign.stages.judged import (
    EngineCall,
    Served,
    Unit,
    adapters_of,
    batches,
    by_model,
    judge_batch,
)
from semalign.stages.scoring import Generation, GenerationRequest, compares_texts, judge
from semalign.tasks import Example
from semalign.tasks.protocols import Protocol

_AHEAD = 2  # batches an engine holds, so that it never waits for the driver

Pending = dict[ray.ObjectRef, Callable[[ray.ObjectRef], None]]


@ray.remote(max_retries=3)
def _judge(
    examples: list[Example],
    requested: list[GenerationRequest],
    generations: list[Generation],
    split: str,
    protocol: Protocol,
    sandbox: Sandbox,
) -> list[Record]:
    return judge(examples, requested, generations, split=split, protocol=protocol, sandbox=sandbox)


def dispatch(
    units: Sequence[Unit],
    settings: Evaluation,
    engines: Mapping[Served, Sequence[Any]],
    *,
    judge_cpus: float = 1,
) -> None:
    """Generate and judge all units, handling whatever is done next: a generation or a verdict.

    `engines` are those that run already; what is missing is started, and ended. Judges are
    processes of `judge_cpus` CPUs each.
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
        for key, group in by_model(units).items():
            running = engines.get(key, ())
            serving = _Engines(group, settings, judge_cpus, pending, bars, running)
            stack.callback(serving.close)
            serving.feed()
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            pending.pop(done[0])(done[0])


class _Engines:
    """The engines of one base model, the batches that wait for them, and those under way.

    Engines that do not fit the cluster yet are started by Ray when others have ended.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        settings: Evaluation,
        judge_cpus: float,
        pending: Pending,
        bars: dict[str, Any],
        running: Sequence[Any],
    ) -> None:
        self.settings, self.judge_cpus = settings, judge_cpus
        self.pending, self.bars = pending, bars
        self.model = units[0].wanted.candidate.model
        self.waiting = deque(batches(units, settings.batch_items))
        self.adapters = adapters_of(units)
        self.shared = bool(running)
        if not running:
            ranks = [adapter_rank(folder) for folder in self.adapters]
            number = min(settings.num_engines, len(self.waiting))
            running = start_engines(self.model, settings, ranks, number)
        self.load = dict.fromkeys(running, 0)

    def feed(self) -> None:
        """Give waiting batches to the idlest engines; end the engines after the last batch."""
        while self.waiting:
            engine = min(self.load, key=self.load.__getitem__)
            if self.load[engine] == _AHEAD:
                return
            batch = self.waiting.popleft()
            adapter = self.adapters.get(batch.unit.wanted.candidate.adapter or "")
            generated = engine.generate.remote(batch.requests, adapter)
            self.load[engine] += 1
            self.pending[generated] = partial(self._generated, engine, batch)
        if not any(self.load.values()):
            self.close()

    def _generated(self, engine: Any, batch: EngineCall, generated: ray.ObjectRef) -> None:
        self.load[engine] -= 1
        self.bars["generate"].update(len(batch.requests))
        wanted = batch.unit.wanted
        if compares_texts(wanted.task, wanted.protocol.profile(wanted.task)):
            self._judged(batch, partial(self._judge_here, batch), generated)
        else:
            judge = _judge.options(scheduling_strategy=ANYWHERE, num_cpus=self.judge_cpus)
            items = batch.examples, batch.requests, generated
            judged = judge.remote(*items, wanted.split, wanted.protocol, self.settings.sandbox)
            self.pending[judged] = partial(self._judged, batch, ray.get)
        self.feed()

    def _judge_here(self, batch: EngineCall, generated: ray.ObjectRef) -> list[Record]:
        """Without a process for it, which would take longer."""
        return judge_batch(batch, ray.get(generated), self.settings.sandbox)

    def _judged(
        self,
        batch: EngineCall,
        records_of: Callable[[ray.ObjectRef], list[Record]],
        reference: ray.ObjectRef,
    ) -> None:
        try:
            records = records_of(reference)
        except Exception as error:
            cause = root_cause(error)
            if not isinstance(cause, RayActorError):
                raise
            wanted, engine = batch.unit.wanted, f"the engine of {self.model.path}"
            if cause.actor_init_failed:
                reason = str(cause).strip().splitlines()[-1]  # of a traceback
                raise Failed(f"{engine} could not be started: {reason}") from error
            raise Failed(
                f"{engine} died more often than evaluation.max_restarts allows, last with "
                f"{wanted.task} {wanted.split} from {batch.examples[0].id} on: "
                f"{one_line(cause, limit=300)}"
            ) from error
        batch.unit.journal.add(records)
        self.bars["judge"].update(len(batch.requests))

    def close(self) -> None:
        if not self.shared:
            stop_engines(self.load)
        self.load = {}
