"""vLLM actors that answer, sandboxed workers that judge, and one loop that feeds both.

The only module that imports vLLM, and only inside the actor. One engine serves a base model and all
its adapters. A dead engine is restarted by Ray and the batches it held are done again; a batch has
one result, so no item is counted twice or lost.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from tqdm.auto import tqdm

from semalign.engine.cluster import require
from semalign.models.loading import (
    load_config,
    load_tokenizer,
    model_fingerprint,
    resolve,
    tokenizer_fingerprint,
)
from semalign.stages.evaluate import (
    Generation,
    GenerationRequest,
    Record,
    SandboxLimits,
    adapter_fingerprint,
    adapter_rank,
    content_key,
    judge,
    read_records,
    requests,
    summarise,
    write_records,
)
from semalign.tasks import Example, load_split
from semalign.tasks.sandbox import require_tier
from semalign.tasks.scores import Score

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM accepts
_AHEAD = 2  # batches an engine holds, so that it never waits for the driver


@dataclass(frozen=True, kw_only=True)
class EngineShape:
    """How many engines a base model gets, and what each may use."""

    dtype: str = "float32"
    num_engines: int = 1
    num_cpus: float = 1
    num_gpus: float = 0
    tensor_parallel_size: int = 1
    max_model_len: int = 1024
    kv_cache_gb: float = 1.0
    max_restarts: int = 2
    batch_items: int = 200
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to score: a base model, or a base model with a LoRA adapter."""

    name: str
    model: str
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Per (candidate, task, split): the records, their Parquet file and the score."""

    records: dict[tuple[str, str, str], list[Record]]
    files: dict[tuple[str, str, str], Path]
    scores: dict[tuple[str, str, str], Score]
    skipped: int  # items whose records were already there
    seconds: float


class Engine:
    """One vLLM engine in a process of its own."""

    def __init__(self, model: str, shape: EngineShape, max_lora_rank: int | None) -> None:
        from vllm import LLM

        on_cpu = shape.num_gpus == 0
        if on_cpu:
            from semalign.engine import cpu_lora

            cpu_lora.install()
        lora = {"enable_lora": True, "max_lora_rank": max_lora_rank, "max_loras": 1}
        self._llm = LLM(
            model,
            dtype=shape.dtype,
            seed=0,
            max_model_len=shape.max_model_len,
            tensor_parallel_size=shape.tensor_parallel_size,
            trust_remote_code=shape.trust_remote_code,
            enforce_eager=on_cpu,
            kv_cache_memory_bytes=int(shape.kv_cache_gb * 2**30) if on_cpu else None,
            use_tqdm_on_load=False,
            **(lora if max_lora_rank else {}),
        )
        self._adapter_ids: dict[str, int] = {}

    def generate(
        self, batch: Sequence[GenerationRequest], adapter: tuple[str, str] | None
    ) -> list[Generation]:
        """Answers in the order of the batch, all with the same (folder, fingerprint) or none.

        One adapter a call: on the CPU vLLM gives a base prompt the adapter of its neighbour.
        """
        from vllm.lora.request import LoRARequest

        lora = None
        if adapter is not None:
            folder, fingerprint = adapter
            # An id seen before would silently mean the adapter seen before: one id a fingerprint.
            number = self._adapter_ids.setdefault(fingerprint, len(self._adapter_ids) + 1)
            lora = LoRARequest(fingerprint, number, folder)
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in batch],
            [_sampling(request) for request in batch],
            lora_request=lora,
            use_tqdm=False,
        )
        return [_generation(*pair) for pair in zip(batch, outputs, strict=True)]


def _sampling(request: GenerationRequest) -> Any:
    from vllm import SamplingParams

    if request.choice_ids is not None:
        # Without detokenize=False every id returned is decoded on its own: 20 times slower.
        ids = list(request.choice_ids)
        return SamplingParams(
            temperature=0, max_tokens=1, logprob_token_ids=ids, detokenize=False, ignore_eos=True
        )
    return SamplingParams(
        n=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        stop=list(request.stop),
    )


def _generation(request: GenerationRequest, output: Any) -> Generation:
    if request.choice_ids is not None:
        scores = output.outputs[0].logprobs[0]
        return Generation(choice_scores=tuple(scores[id].logprob for id in request.choice_ids))
    return Generation(
        texts=tuple(sample.text for sample in output.outputs),
        token_ids=tuple(tuple(sample.token_ids) for sample in output.outputs),
    )


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


@dataclass(eq=False)
class _Unit:
    """The items of one candidate, task and split; ``parts`` fills with judged batches by offset."""

    candidate: Candidate
    task: str
    split: str
    examples: list[Example]
    file: Path
    parts: dict[int, list[Record]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.candidate.name, self.task, self.split

    @property
    def judged(self) -> int:
        return sum(map(len, self.parts.values()))


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
    decides them; files already there are read instead. Raises UserError for bad input and for a
    machine whose sandbox is weaker than asked.
    """
    begin = time.monotonic()
    require_tier(sandbox.min_tier)
    require(cpus=shape.num_cpus, gpus=shape.num_gpus, what="evaluation")
    data = {(task, split): load_split(root, task, split) for task in tasks for split in splits}
    units = [
        _Unit(candidate, task, split, examples, folder / _file_name(candidate, examples, split, shape, sandbox))
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
        skipped=sum(len(unit.examples) for unit in units) - sum(len(u.examples) for u in todo),
        seconds=time.monotonic() - begin,
    )


def _file_name(
    candidate: Candidate,
    examples: list[Example],
    split: str,
    shape: EngineShape,
    sandbox: SandboxLimits,
) -> str:
    model = model_fingerprint(candidate.model), tokenizer_fingerprint(candidate.model)
    adapter = candidate.adapter and adapter_fingerprint(candidate.adapter)
    key = content_key(
        examples, split, sandbox, model=model, adapter=adapter, dtype=shape.dtype,
        max_model_len=shape.max_model_len,
    )
    return f"{examples[0].task}-{split}-{key[:20]}.parquet"


def _run(units: list[_Unit], shape: EngineShape, sandbox: SandboxLimits) -> None:
    """Generate and judge all units: one loop over whatever is finished next, engines or judges."""
    pending: dict[ray.ObjectRef, Callable[[ray.ObjectRef], None]] = {}
    models = list(dict.fromkeys(unit.candidate.model for unit in units))
    total = sum(len(unit.examples) for unit in units)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, desc="evaluate", unit="item", smoothing=0.1))
        for model in models:
            served = [unit for unit in units if unit.candidate.model == model]
            group = _Group(model, served, shape, sandbox, pending, bar)
            stack.callback(group.close)
            group.feed()
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            pending.pop(done[0])(done[0])


class _Group:
    """The engines of one base model, the batches waiting for them, and those under way."""

    def __init__(
        self,
        model: str,
        units: list[_Unit],
        shape: EngineShape,
        sandbox: SandboxLimits,
        pending: dict[ray.ObjectRef, Callable[[ray.ObjectRef], None]],
        bar: Any,
    ) -> None:
        self.model, self.sandbox, self.pending, self.bar = model, sandbox, pending, bar
        trust = shape.trust_remote_code
        positions = load_config(model, trust_remote_code=trust).get_text_config()
        limit = getattr(positions, "max_position_embeddings", shape.max_model_len)
        self.shape = dataclasses.replace(shape, max_model_len=min(shape.max_model_len, limit))
        self.batches = deque(self._batches(units, load_tokenizer(model, trust_remote_code=trust)))
        self.load = {engine: 0 for engine in self._start(units)}
