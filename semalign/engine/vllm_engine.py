"""The vLLM engine: the only module that imports vLLM, once its process runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from semalign.config.sections import Evaluation
from semalign.engine.limits import LORA_RANKS
from semalign.models.reference import Model
from semalign.stages.scoring import Generation, GenerationRequest

# Of an engine's process, before anything is imported.
ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" puts every engine on the same cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the model is a local folder by now
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}

Adapter = tuple[str, str]  # folder, fingerprint


class Engine:
    """One vLLM engine in a process of its own.

    `folder` has the model; with `max_lora_rank` there is room for one adapter up to that rank.
    """

    def __init__(
        self, folder: str, model: Model, settings: Evaluation, max_lora_rank: int | None
    ) -> None:
        # vLLM configures its logging only when the engine starts, and warns before.
        logging.getLogger("vllm").setLevel(logging.ERROR)
        from vllm import LLM

        on_cpu = settings.num_gpus == 0
        if on_cpu:
            from semalign.engine import cpu_lora

            cpu_lora.install()
        lora = {"enable_lora": True, "max_lora_rank": max_lora_rank, "max_loras": 1}
        self._llm = LLM(
            folder,
            dtype=model.dtype,
            seed=0,
            max_model_len=min(settings.max_model_len, int(model.config.max_position_embeddings)),
            tensor_parallel_size=settings.tensor_parallel_size,
            trust_remote_code=model.trust_remote_code,
            enforce_eager=on_cpu,
            kv_cache_memory_bytes=int(settings.kv_cache_gb * 2**30) if on_cpu else None,
            use_tqdm_on_load=False,
            **(lora if max_lora_rank else {}),
        )
        self._adapter_ids: dict[str, int] = {}

    def generate(
        self, batch: Sequence[GenerationRequest], adapter: Adapter | None
    ) -> list[Generation]:
        """Answers in the order of the batch, all with the same adapter or none.

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


def lora_room(ranks: Sequence[int]) -> int | None:
    """The smallest rank that vLLM accepts with room for all of these; None without any."""
    return next(rank for rank in LORA_RANKS if rank >= max(ranks)) if ranks else None


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
        unfinished=tuple(sample.finish_reason == "length" for sample in output.outputs),
    )
