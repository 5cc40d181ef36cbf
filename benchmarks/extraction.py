"""Extraction through the cluster's worker against a bare forward pass that stops early.

    python benchmarks/extraction.py [examples=512] [rounds=5]

A random Llama of 8 layers and width 256; rows of 64 to 192 ids; the outputs of layer 5's MLP, all
positions, in bfloat16. The bare pass runs the first five layers over the same batches, without a
mask, and keeps nothing. Ours is what a transfer runs: shards are written, hashed and listed. One
thread each. The sides take turns, on other rows each round; the first, in which a worker starts
and loads the model, is shown apart. The ratio is bare / ours, the median of the rounds.
"""

from __future__ import annotations

import functools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from semalign.artifacts.activations import Column
from semalign.artifacts.artifact import Workspace
from semalign.artifacts.local import LocalExecutor, Timer
from semalign.config.read import resolve
from semalign.data.batches import length_buckets, pad
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens
from semalign.engine.cluster import connect
from semalign.engine.executor import RayExecutor
from semalign.models.loading import load_model, load_tokenizer
from semalign.models.reference import Model
from semalign.report.table import markdown
from semalign.stages.extraction import Activations

LAYER = 5  # from 1


def make_model(folder: Path) -> Model:
    tokenizer = load_tokenizer("zoo/student")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model.open(str(folder), dtype="float32")


def examples(count: int, seed: int) -> Dataset:
    draw = random.Random(seed)
    lengths = [draw.randrange(64, 193) for _ in range(count)]
    return Dataset(
        Tokens(str(n), tuple(draw.randrange(3, 640) for _ in range(length)), length // 2)
        for n, length in enumerate(lengths)
    )


def activations(model: Model, rows: Dataset, settings: list[str]) -> Activations:
    return Activations(
        model=model,
        rows=rows,
        columns=frozenset([Column(LAYER - 1, "mlp")]),
        positions="all",
        dtype="bfloat16",
        extraction=resolve([], settings).extraction,
    )


@torch.inference_mode()
def bare(base: torch.nn.Module, wanted: Activations) -> None:
    size, rows = wanted.extraction.shard_examples, wanted.rows
    for start in range(0, len(rows), size):
        shard = rows[start : start + size]
        for batch in length_buckets(shard, wanted.extraction.batch_tokens):
            base(input_ids=pad([shard[index] for index in batch], 0)[0], use_cache=False)


def main(given: Mapping[str, str]) -> None:
    torch.set_num_threads(1)
    count, rounds = int(given.get("examples", 512)), int(given.get("rounds", 5))
    times: dict[str, list[float]] = {"bare": [], "in this process": [], "through a worker": []}
    with tempfile.TemporaryDirectory() as folder, connect(None, num_cpus=2):
        settings = [f"workdir={folder}/work", "extraction.num_actors=1"]
        model = make_model(Path(folder) / "model")
        base = load_model(model.path, dtype="float32", num_layers=LAYER).model
        here = LocalExecutor(Workspace(Path(folder) / "here"), timer=Timer(quiet=True))
        config = resolve([], settings)
        with RayExecutor(config, Workspace(config.work), timer=Timer(quiet=True)) as there:
            for seed in range(rounds + 1):  # the first is the start
                wanted = activations(model, examples(count, seed), settings)
                calls: list[Callable[[Activations], object]] = [
                    functools.partial(bare, base), here.make, there.make,
                ]  # fmt: skip
                for call, taken in zip(calls, times.values(), strict=True):
                    begin = time.perf_counter()
                    call(wanted)
                    taken.append(time.perf_counter() - begin)
    rows = []
    for name, (first, *rest) in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["bare"][1:], rest, strict=True))
        rows.append([name, f"{first:.2f}", f"{statistics.median(rest):.2f}", f"{ratio:.3f}"])
    print(markdown(["side", "first round, s", "a round, s", "bare / it"], rows))


if __name__ == "__main__":
    main(dict(word.split("=", 1) for word in sys.argv[1:]))
