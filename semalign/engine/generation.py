"""The vLLM engine and its process: the only module that imports vLLM, once the process runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from semalign.config.jobs import LARGEST_RANK
from semalign.stages.scoring import Generation, GenerationRequest

# Not in the placement group of the process that starts it, which may be a Ray Tune trial's.
ANYWHERE = PlacementGroupSchedulingStrategy(placement_group=None)
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, LARGEST_RANK)  # what vLLM accepts


@dataclass(frozen=True, kw_only=True)
class EngineShape:
    """How many engines a base model gets, and what each may use; ``num_gpus`` is per rank.

    With ``holds_cpus`` False they use their CPUs without keeping others from them.
    """

    dtype: str = "float32"
    num_engines: int = 1
    num_cpus: float = 1
    holds_cpus: bool = True
    num_gpus: float = 0
    tensor_parallel_size: int = 1
    max_model_len: int = 1024
    kv_cache_gb: float = 1.0
    max_restarts: int = 2
    batch_items: int = 200
    trust_remote_code: bool = False


class Engine:
    """One vLLM engine in a process of its own."""

    def __init__(self, model: str, shape: EngineShape, max_lora_rank: int | None) -> None:
        # vLLM configures its logging only when the engine starts, and warns before.
        logging.getLogger("vllm").setLevel(logging.ERROR)
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
        seed=request.seed if request.temperature else None,
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


def start_engine(model: str, shape: EngineShape, max_lora_rank: int | None) -> Any:
    """A handle to an Engine actor for the model in folder ``model``, with room for adapters.

    A dead engine is restarted up to ``max_restarts`` times and the calls it held are made again.
    """
    threads = str(max(1, math.floor(shape.num_cpus)))
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" puts every engine on the same cores
        "OMP_NUM_THREADS": threads,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a local folder by now
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }
    actor = ray.remote(Engine).options(
        num_cpus=shape.num_cpus if shape.holds_cpus else 0,
        num_gpus=shape.num_gpus * shape.tensor_parallel_size,
        # what holds nothing would all be put on one node
        scheduling_strategy=ANYWHERE if shape.holds_cpus else "SPREAD",
        max_restarts=shape.max_restarts,
        max_task_retries=shape.max_restarts,
        runtime_env={"env_vars": environment},
    )
    return actor.remote(model, shape, max_lora_rank)
