"""Every family that is supported, from attribution to vLLM: the tokens equal those of transformers.

    python benchmarks/families.py [family ...]

For each family a teacher and a student with random weights and the shipped tokenizer: attribution,
extraction, a LoRA trained on one layer and its merged checkpoint. Then vLLM answers eight prompts
greedily as the student, with the adapter and as the merged model, in float32, one engine at a time.
Prints Markdown: for each of the three, how many tokens equal transformers'; then the families that
the plan refuses, each with its line.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from semalign.artifacts.artifact import Workspace
from semalign.artifacts.local import LocalExecutor, Timer
from semalign.config.read import resolve
from semalign.config.sections import Evaluation
from semalign.engine.limits import check_engines
from semalign.engine.transfer import make
from semalign.engine.vllm_engine import ENGINE_ENVIRONMENT, Engine, lora_room
from semalign.methods import Transfer
from semalign.models.adapters import merge_adapter
from semalign.models.loading import load_tokenizer
from semalign.models.reference import Model
from semalign.report.table import markdown
from semalign.stages.adaptation import ADAPTER
from semalign.stages.scoring import GenerationRequest

TOKENIZER, RANK, NEW_TOKENS = "zoo/student", 4, 24
SHARED: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest for which vLLM has a kernel on CPUs
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # large enough that every sublayer matters
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
# larger embeddings, which are also the head, would repeat the last token whatever is trained
_GEMMA = {**_ALTERNATING, "query_pre_attn_scalar": 32, "initializer_range": 0.02}
_LONGER = {"training.epochs": "20"}  # or norms after the sublayers hide what is trained
_PHI = {"training.lora.target_modules": "[qkv_proj,o_proj,gate_up_proj,down_proj]"}
_GLM = {"training.lora.target_modules": "[v_proj,o_proj,down_proj]"}
_GLM_MERGED = {"training.lora.target_modules": "[v_proj,o_proj,gate_up_proj,down_proj]"}
_PLAIN = {"training.lora.target_modules": "[v_proj,o_proj]"}


@dataclass(frozen=True)
class Family:
    """A configuration class of transformers, what differs from SHARED, and settings it needs."""

    config: str
    changes: dict[str, Any]
    settings: dict[str, str]


FAMILIES = {
    name: Family(config, changes, settings)
    for name, config, changes, settings in (
        ("llama", "LlamaConfig", {}, {}),
        ("llama, tied", "LlamaConfig", {"tie_word_embeddings": True}, {}),
        ("mistral", "MistralConfig", {"sliding_window": 32}, {}),
        ("qwen2", "Qwen2Config", {}, {}),
        ("qwen3", "Qwen3Config", {}, {}),
        ("gemma", "GemmaConfig", {}, {}),
        ("gemma2", "Gemma2Config", _GEMMA, _LONGER),
        ("gemma3", "Gemma3TextConfig", _GEMMA, _LONGER),
        ("olmo2", "Olmo2Config", {}, _LONGER),
        ("olmo3", "Olmo3Config", _ALTERNATING, _LONGER),
        ("smollm3", "SmolLM3Config", {}, {}),
        ("granite", "GraniteConfig", {}, {}),
        ("exaone4", "Exaone4Config", _ALTERNATING, {}),
        ("seed-oss", "SeedOssConfig", {}, {}),
        ("phi3", "Phi3Config", {}, _PHI),
        ("glm4", "Glm4Config", {"partial_rotary_factor": 0.5}, _GLM),
    )
}
# On CPUs vLLM has no adapters of these.
ON_GPUS = {"mixtral": Family("MixtralConfig", {"num_local_experts": 4}, _PLAIN)}
# Refused by the plan: what transformers and vLLM both serve, and why not here.
REFUSED = {
    "cohere": Family("CohereConfig", {}, {}),
    "granite, scaled": Family("GraniteConfig", {"residual_multiplier": 0.2}, {}),
    "gpt-neox": Family("GPTNeoXConfig", {}, {}),
    "phi3, paper's targets": Family("Phi3Config", {}, {}),
    "glm4, gate and up in one": Family("Glm4Config", {"partial_rotary_factor": 0.5}, _GLM_MERGED),
    "mixtral, paper's targets": Family("MixtralConfig", {"num_local_experts": 4}, {}),
    "mixtral, an adapter on a CPU": ON_GPUS["mixtral"],
}


def make_model(family: Family, folder: Path, *, seed: int) -> Path:
    """A model of two layers with random weights, in the folder."""
    config = getattr(transformers, family.config)(
        **SHARED | {"num_hidden_layers": 2} | family.changes
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(TOKENIZER).save_pretrained(folder)
    return folder


def prepare(family: Family, folder: Path, *, planned: bool = False) -> Transfer:
    """A transfer between two random models of the family; raises UserError where it is refused."""
    teacher, student = (
        make_model(family, folder / name, seed=seed)
        for seed, name in enumerate(("teacher", "student"))
    )
    settings = {
        **{"teacher": teacher, "student": student, "workdir": folder / "work"},
        **{"dtype": "float32", "data.train_limit": 16},
        **{"training.epochs": 2, "training.lr": 0.02, "training.lora.rank": RANK},
        **{"training.batch_size": 8, "training.micro_batch_size": 8, "evaluation.tasks": "[mmlu]"},
        **family.settings,
    }
    given = [f"{name}={value}" for name, value in settings.items()]
    return Transfer.of(resolve([], given), planned=planned)


def transferred(family: Family, folder: Path) -> tuple[Path, Path, Path]:
    """The folders of a student, of its trained adapter, and of both merged."""
    transfer = prepare(family, folder)
    executor = LocalExecutor(Workspace(transfer.config.work), timer=Timer(quiet=True))
    recipe = make(transfer, executor, quiet=True)
    student = Path(transfer.config.student)
    adapter = executor.workspace.place(recipe.result) / ADAPTER
    merge_adapter(student, adapter, folder / "merged")
    return student, adapter, folder / "merged"


def prompts() -> list[list[int]]:
    """Token ids of different lengths, some longer than the sliding windows."""
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 9, 17, 30, 40, 55, 70, 90)
    return [torch.randint(3, 640, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def by_transformers(folder: Path, adapter: Path | None = None) -> list[list[int]]:
    """Greedy tokens of transformers, in eager attention."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    found = []
    for ids in prompts():
        whole = model.generate(
            input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        found.append(whole[0, len(ids) :].tolist())
    return found


def by_vllm(folder: Path, adapters: Sequence[Path | None]) -> list[list[list[int]]]:
    """Greedy tokens of vLLM with each adapter or none, by one engine; for a process of its own."""
    model = Model.open(str(folder), dtype="float32", planned=True)
    requests = [
        GenerationRequest(id=str(n), prompt_ids=tuple(ids), max_tokens=NEW_TOKENS)
        for n, ids in enumerate(prompts())
    ]
    room = lora_room([RANK for adapter in adapters if adapter is not None])
    settings = Evaluation(max_model_len=256, kv_cache_gb=0.25)
    engine = Engine(str(folder), model, settings, room)
    found = []
    for adapter in adapters:
        chosen = None if adapter is None else (str(adapter), adapter.parent.name)
        answers = engine.generate(requests, chosen)
        found.append([list(answer.token_ids[0]) for answer in answers])
    return found


def equal(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """The share of tokens that are equal, of all that transformers gave."""
    pairs = [
        (a, b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip([*one, *[None] * (len(other) - len(one))], other, strict=False)
    ]
    return f"{sum(a == b for a, b in pairs)}/{len(pairs)}"


def measure(name: str, engines: Executor) -> tuple[str, ...]:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.redirect_stdout(io.StringIO()):
            student, adapter, merged = transferred(FAMILIES[name], Path(scratch))
        base, adapted = by_transformers(student), by_transformers(student, adapter)
        served = [
            tokens
            for folder, adapters in ((student, [None, adapter]), (merged, [None]))
            for tokens in engines.submit(by_vllm, folder, adapters).result()
        ]
        expected = [base, adapted, by_transformers(merged)]
    changed = sum(a != b for a, b in zip(base, adapted, strict=True))
    shares = [equal(*pair) for pair in zip(served, expected, strict=True)]
    return name, *shares, f"{changed} of {len(base)}", f"{time.monotonic() - begin:.0f}"


def refusal(family: Family) -> str:
    """The line in which the plan refuses it."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            check_engines([prepare(family, Path(scratch), planned=True)])
        except ValueError as error:
            return str(error).replace(scratch, "")
    return "accepted"


def main(names: Sequence[str]) -> None:
    os.environ.update(ENGINE_ENVIRONMENT)
    head = ("family", "student", "with adapter", "merged", "answers changed", "seconds")
    rows = []
    # vLLM must not share a process with training, nor one engine with the next
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as engines:
        for name in names or FAMILIES:
            rows.append(measure(name, engines))
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(markdown(head, rows))
    if not names:
        print(markdown(("refused", "line"), [(n, refusal(f)) for n, f in REFUSED.items()]))


if __name__ == "__main__":
    main(sys.argv[1:])
