"""The vLLM engine: the only module that imports vLLM, once its process runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from semalign.config.sections import Evaluation
from semalign.data.likelihood import Span
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

        self._on_cpu = on_cpu = settings.num_gpus == 0
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
        whole = self._on_cpu or lora is None
        prompts = [prompt for request in batch for prompt in _prompts(request, whole)]
        outputs = iter(
            self._llm.generate(
                [{"prompt_token_ids": list(ids)} for ids, _ in prompts],
                [sampling for _, sampling in prompts],
                lora_request=lora,
                use_tqdm=False,
            )
        )
        return [_generation(request, outputs, whole) for request in batch]


def lora_room(ranks: Sequence[int]) -> int | None:
    """The smallest rank that vLLM accepts with room for all of these; None without any."""
    return next(rank for rank in LORA_RANKS if rank >= max(ranks)) if ranks else None


def _prompts(request: GenerationRequest, whole: bool) -> Iterator[tuple[Sequence[int], Any]]:
    """The prompts of one request, each with how it is sampled.

    A span is one prompt, whose tokens vLLM scores; or, not `whole`, a prompt for each scored token:
    on GPUs vLLM scores no prompts with an adapter (vllm-project/vllm#16668).
    """
    from vllm import SamplingParams

    # Without detokenize=False every id returned is decoded on its own: 20 times slower.
    one = {"temperature": 0, "max_tokens": 1, "detokenize": False, "ignore_eos": True}
    if request.choice_ids is not None:
        choices = list(request.choice_ids)
        yield request.prompt_ids, SamplingParams(**one, logprob_token_ids=choices)
        return
    for ids, start in request.spans:
        if whole:
            yield ids, SamplingParams(**one, prompt_logprobs=0)
            continue
        for at in range(start, len(ids)):
            yield ids[:at], SamplingParams(**one, logprob_token_ids=[ids[at]])
    if not request.spans:
        yield (
            request.prompt_ids,
            SamplingParams(
                n=request.n,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed if request.temperature else None,
                max_tokens=request.max_tokens,
                stop=list(request.stop),
            ),
        )


def _generation(request: GenerationRequest, outputs: Iterator[Any], whole: bool) -> Generation:
    """The answer to one request, from the outputs of its prompts."""
    if request.choice_ids is not None:
        scores = next(outputs).outputs[0].logprobs[0]
        return Generation(choice_scores=tuple(scores[id].logprob for id in request.choice_ids))
    if request.spans:
        scored = [list(_scored(span, outputs, whole)) for span in request.spans]
        return Generation(
            choice_scores=tuple(sum(found.logprob for found in row) for row in scored),
            greedy=tuple(all(found.rank == 1 for found in row) for row in scored),
        )
    output = next(outputs)
    return Generation(
        texts=tuple(sample.text for sample in output.outputs),
        token_ids=tuple(tuple(sample.token_ids) for sample in output.outputs),
        unfinished=tuple(sample.finish_reason == "length" for sample in output.outputs),
    )


def _scored(span: Span, outputs: Iterator[Any], whole: bool) -> Iterator[Any]:
    """vLLM's log-probability and rank of each scored token of a span."""
    ids, start = span
    if whole:
        found = next(outputs).prompt_logprobs
        yield from (found[at][ids[at]] for at in range(start, len(ids)))
        return
    for at in range(start, len(ids)):
        yield next(outputs).outputs[0].logprobs[0][ids[at]]
