"""Makes everything the zoo ships: data, tokenizer, weights, and the scores its README quotes.

    python -m semalign.zoo.recipe --out semalign/zoo
    python -m semalign.zoo.recipe --out semalign/zoo --only student

Deterministic from the seeds on one thread of a CPU; a GPU is used if there is one.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from semalign.core.statistics import score
from semalign.tasks import load_split
from semalign.zoo import MODELS, splits
from semalign.zoo.scoring import right_answers
from semalign.zoo.tokenizer import LONGEST, build_tokenizer
from semalign.zoo.training import examples, train_model

_log = logging.getLogger(__name__)
TOKENIZER_ROWS = 2000
"""Pretraining rows per task that the tokenizer is trained on."""
MARK = "<!-- scores -->\n"
"""Before and after the README's table."""
EXTRA_TOKEN = "<code>"
"""The code teacher's additional vocabulary entry."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One model: its shape, or the model it starts from, and its training.

    `rows` are the rows of each task in one step. The student sees fewer steps than the teacher, so
    that it is left with room to improve, and mostly sums, which it learns slowest.
    """

    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    intermediate_size: int = 0
    start: str | None = None
    steps: int
    rows: Mapping[str, int]
    learning_rate: float
    seed: int


ALL = {"mmlu": 16, "gsm8k": 24, "humaneval": 8, "mbpp": 8}
TRAINING_RUNS = {
    "teacher": TrainingRun(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=384,
        rows=ALL,
        steps=900,
        learning_rate=3e-3,
        seed=1,
    ),
    "student": TrainingRun(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        rows={"mmlu": 8, "gsm8k": 32, "humaneval": 6, "mbpp": 6},
        steps=450,
        learning_rate=3e-3,
        seed=2,
    ),
    "code-teacher": TrainingRun(
        start="teacher",
        rows={"humaneval": 16, "mbpp": 16},
        steps=100,
        learning_rate=5e-4,
        seed=3,
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, from the first pretraining rows of each task."""
    return build_tokenizer(
        example.prompt + example.answer
        for task in splits.GENERATORS
        for example in islice(examples(task, splits.SEED), TOKENIZER_ROWS)
    )


def new_model(run: TrainingRun, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """A Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=run.hidden_size,
            num_hidden_layers=run.num_hidden_layers,
            num_attention_heads=run.num_attention_heads,
            num_key_value_heads=run.num_key_value_heads,
            intermediate_size=run.intermediate_size,
            head_dim=32,
            initializer_range=run.hidden_size**-0.5,  # 0.02 is too small at these widths
            max_position_embeddings=LONGEST,
            tie_word_embeddings=False,
            attn_implementation="eager",  # in bfloat16 on a CPU, faster than the fused kernel
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def extended(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A saved model and its tokenizer with one vocabulary entry more."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([EXTRA_TOKEN])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def make_model(name: str, out: Path, device: str) -> float:
    """Train a model and save it as bf16 safetensors; the seconds it took."""
    run = TRAINING_RUNS[name]
    torch.manual_seed(run.seed)
    if run.start is None:
        tokenizer = make_tokenizer()
        model = new_model(run, tokenizer)
    else:
        model, tokenizer = extended(out / run.start)
    seconds = train_model(
        model.to(device),
        tokenizer,
        rows=run.rows,
        steps=run.steps,
        learning_rate=run.learning_rate,
        seed=run.seed,
    )
    model.to(torch.bfloat16).save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    return seconds


def score_model(name: str, out: Path, device: str) -> dict[str, dict[str, Any]]:
    """Scores of the saved, bf16-rounded weights, computed in float32, on dev and test."""
    tokenizer = AutoTokenizer.from_pretrained(out / name)
    model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32).to(device)
    scores: dict[str, dict[str, Any]] = {"dev": {}, "test": {}}
    for split, by_task in scores.items():
        for task in splits.GENERATORS:
            right = right_answers(model, tokenizer, load_split(out / "data", task, split))
            by_task[task] = asdict(score(right))
            _log.info("%s, %s, %s: %d of %d", name, task, split, sum(right), len(right))
    return scores


def table(results: dict[str, dict[str, Any]]) -> str:
    """The test scores in percent with their intervals, as the README shows them."""
    tasks = list(splits.GENERATORS)
    lines = [["", *tasks, "training"], ["---"] * (len(tasks) + 2)]
    for name in (model for model in MODELS if "test" in results.get(model, {})):
        cells = [
            f"{100 * s['value']:.1f} ({100 * s['low']:.1f} to {100 * s['high']:.1f})"
            for s in (results[name]["test"][task] for task in tasks)
        ]
        lines.append([name, *cells, f"{results[name]['training_seconds'] / 60:.0f} min"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def record(name: str, out: Path, result: dict[str, Any]) -> None:
    """Add one model's result to results.json, and the table of all to the README if it is there."""
    path, readme = out / "results.json", out / "README.md"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = results.get(name, {}) | result
    path.write_text(json.dumps(results, indent=2) + "\n")
    if readme.exists():
        before, _, after = readme.read_text().split(MARK)
        readme.write_text(f"{before}{MARK}\n{table(results)}\n{MARK}{after}")


def run_recipe() -> None:
    parser = argparse.ArgumentParser(description="Make the zoo: data, tokenizer, weights, scores.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--only", choices=(*MODELS, "data"), help="make this part alone")
    parser.add_argument("--skip-training", action="store_true", help="score what is there")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)  # more are no faster at these sizes, and one gives one result
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.only in (None, "data"):
        splits.write(arguments.out / "data")
    for name in (model for model in TRAINING_RUNS if arguments.only in (None, model)):
        result: dict[str, Any] = {}
        if not arguments.skip_training:
            result["training_seconds"] = round(make_model(name, arguments.out, device))
        record(name, arguments.out, result | score_model(name, arguments.out, device))


if __name__ == "__main__":
    run_recipe()
