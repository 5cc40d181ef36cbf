"""Engines that answer, sandboxed workers that judge, and the one loop that feeds both.

A dead engine is restarted by Ray and the batches it held are done again; a batch has one result, so
no item is counted twice or lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from tqdm.auto import tqdm

from semalign.engine.generation import LORA_RANKS, EngineShape, start_engine
from semalign.models.loading import (
    load_config,
    load_tokenizer,
    model_fingerprint,
    resolve,
    tokenizer_fingerprint,
)
from semalign.stages.evaluate import Generation, GenerationRequest, SandboxLimits, judge, requests
from semalign.stages.records import (
    Record,
    adapter_fingerprint,
    adapter_rank,
    content_key,
    read_records,
    summarise,
    write_records,
)
from semalign.tasks import TASKS, Example, load_split
from semalign.tasks.sandbox import require_tier
from semalign.tasks.scores import Score

_AHEAD = 2  # batches an engine holds, so that it never waits for the driver

Key = tuple[str, str, str]  # candidate, task, split
Pending = dict[ray.ObjectRef, Callable[[ray.ObjectRef], None]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to score: a base model, or a base model with a LoRA adapter in PEFT's layout."""

    name: str
    model: str
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Per (candidate, task, split): the records, their Parquet file and the score."""

    records: dict[Key, list[Record]]
    files: dict[Key, Path]
    scores: dict[Key, Score]
    generated: int  # items answered now; the others' records were already there
    seconds: float


def evaluate(
    candidates: Sequence[Candidate],
    *,
    tasks: Sequence[str],
    splits: Sequence[str],
    root: Path,
    folder: Path,
    shape: EngineShape,
    sandbox: SandboxLimits,
) -> Evaluation:
    """Score every candidate on every task and split; needs a running Ray.

    Records go to ``folder``, one Parquet file a candidate, task and split, named by everything that
    decides them; files already there are read instead. Raises UserError for bad input, and for a
    machine whose sandbox is weaker than asked.
    """
    begin = time.monotonic()
    if any(TASKS[task].kind == "code" for task in tasks if task in TASKS):
        require_tier(sandbox.min_tier)
    data = {(task, split): load_split(root, task, split) for task in tasks for split in splits}
    name = partial(_file_name, shape=shape, sandbox=sandbox)
    units = [
        _Unit(candidate, task, split, examples, folder / name(candidate, examples, split))
        for candidate in candidates
        for (task, split), examples in data.items()
    ]
    todo = [unit for unit in {unit.file: unit for unit in units}.values() if not unit.file.exists()]
    if todo:
        folder.mkdir(parents=True, exist_ok=True)
        _run(todo, shape, sandbox)
    records = {unit.key: read_records(unit.file) for unit in units}
    return Evaluation(
        records=records,
        files={unit.key: unit.file for unit in units},
        scores={key: summarise(rows)[key[1:]] for key, rows in records.items()},
        generated=sum(len(unit.examples) for unit in todo),
        seconds=time.monotonic() - begin,
    )


def _file_name(
    candidate: Candidate,
    examples: list[Example],
    split: str,
    *,
    shape: EngineShape,
    sandbox: SandboxLimits,
) -> str:
    key = content_key(
        examples,
        split,
        model=[model_fingerprint(candidate.model), tokenizer_fingerprint(candidate.model)],
        adapter=candidate.adapter and adapter_fingerprint(candidate.adapter),
        dtype=shape.dtype,
        max_model_len=shape.max_model_len,
        sandbox=[sandbox.timeout_s, sandbox.memory_mb, sandbox.min_tier],
    )
    return f"{examples[0].task}-{split}-{key[:20]}.parquet"


@dataclass(eq=False)
class _Unit:
    """The items of one candidate, task and split; judged batches come in any order."""

    candidate: Candidate
    task: str
    split: str
    examples: list[Example]
    file: Path
    judged: dict[int, list[Record]] = field(default_factory=dict)  # by the first item's index

    @property
    def key(self) -> Key:
        return self.candidate.name, self.task, self.split

    def add(self, start: int, records: list[Record]) -> None:
        """Keep a batch's records; write the file when they are all there."""
        self.judged[start] = records
        rows = [record for _, part in sorted(self.judged.items()) for record in part]
        if len({record.id for record in rows}) == len(self.examples):
            write_records(self.file, rows)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Items ``start`` and following of a unit, whose examples lie in Ray's store."""

    unit: _Unit
    start: int
    requests: list[GenerationRequest]
    examples: ray.ObjectRef


def _batches(units: Sequence[_Unit], tokenizer: Any, shape: EngineShape) -> list[_Batch]:
    """All batches, code first: its verdicts take longest and can be reached while others run."""
    batches = []
    for unit in sorted(units, key=lambda unit: TASKS[unit.task].kind != "code"):
        asked = requests(unit.examples, tokenizer, max_model_len=shape.max_model_len)
        examples = ray.put(unit.examples)
        for start in range(0, len(asked), shape.batch_items):
            part = asked[start : start + shape.batch_items]
            batches.append(_Batch(unit, start, part, examples))
    return batches


@ray.remote(max_retries=3)
def _judge(
    examples: list[Example],
    start: int,
    generations: list[Generation],
    split: str,
    sandbox: SandboxLimits,
) -> list[Record]:
    part = examples[start : start + len(generations)]
    return judge(part, generations, split=split, sandbox=sandbox)


def _run(units: list[_Unit], shape: EngineShape, sandbox: SandboxLimits) -> None:
    """Generate and judge all units, handling whatever is done next: a generation or a verdict."""
    total = sum(len(unit.examples) for unit in units)
    pending: Pending = {}
    with contextlib.ExitStack() as stack:
        bars = {
            name: stack.enter_context(tqdm(total=total, desc=name, unit="item", position=line))
            for line, name in enumerate(("generate", "judge"))
        }
        for model in dict.fromkeys(unit.candidate.model for unit in units):
            served = [unit for unit in units if unit.candidate.model == model]
            engines = _Engines(model, served, shape, sandbox, pending, bars)
            stack.callback(engines.close)
            engines.feed()
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            pending.pop(done[0])(done[0])


class _Engines:
    """The engines of one base model, the batches that wait for them, and those under way.

    Engines that do not fit the cluster yet are started by Ray when others have ended.
    """

    def __init__(
        self,
        model: str,
        units: Sequence[_Unit],
        shape: EngineShape,
        sandbox: SandboxLimits,
        pending: Pending,
        bars: dict[str, Any],
    ) -> None:
        self.model, self.sandbox, self.pending, self.bars = model, sandbox, pending, bars
        trust = shape.trust_remote_code
        config = load_config(model, trust_remote_code=trust).get_text_config()
        length = min(shape.max_model_len, config.max_position_embeddings)
        shape = dataclasses.replace(shape, max_model_len=length)
        tokenizer = load_tokenizer(model, trust_remote_code=trust)
        self.waiting = deque(_batches(units, tokenizer, shape))
        self.adapters = {
            folder: (str(Path(folder).resolve()), adapter_fingerprint(folder))
            for unit in units
            if (folder := unit.candidate.adapter)
        }
        ranks = [adapter_rank(folder) for folder in self.adapters]
        room = next(rank for rank in LORA_RANKS if rank >= max(ranks)) if ranks else None
        number = min(shape.num_engines, len(self.waiting))
        self.load = {start_engine(str(resolve(model)), shape, room): 0 for _ in range(number)}

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
        unit = batch.unit
        judged = _judge.remote(batch.examples, batch.start, generated, unit.split, self.sandbox)
        self.pending[judged] = partial(self._judged, batch)
        self.feed()

    def _judged(self, batch: _Batch, judged: ray.ObjectRef) -> None:
        try:
            records = ray.get(judged)
        except RayActorError as error:
            raise RuntimeError(
                f"the engine of {self.model} died more often than evaluation.max_restarts allows, "
                f"last with {batch.unit.task} {batch.unit.split} from item {batch.start} on"
            ) from error
        batch.unit.add(batch.start, records)
        self.bars["judge"].update(len(batch.requests))

    def close(self) -> None:
        for engine in self.load:
            ray.kill(engine)
        self.load = {}
