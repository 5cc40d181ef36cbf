"""A dataset of the zoo's GSM8K rows as token ids, and a training job on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from semalign import zoo
from semalign.artifacts.activations import ActivationStore, Column, Identity
from semalign.config.sections import Lora
from semalign.core.pairing import Pair
from semalign.data.tokens import Tokens, tokenise
from semalign.models.loading import load_model, load_tokenizer
from semalign.stages.extraction import extract_shard
from semalign.stages.job import Hyperparameters, ModelSpec, TrainJob
from semalign.stages.mapping import Transport
from semalign.stages.supervision import final_column
from semalign.tasks import load_split


@pytest.fixture(scope="session")
def tokens(family: dict[str, Path]) -> list[Tokens]:
    examples = load_split(zoo.path("zoo/data"), "gsm8k", "extract")[:10]
    return tokenise(examples, load_tokenizer(family["student"]), max_length=512)


def make_store(
    path: Path, model: Path, tokens: list[Tokens], columns: list[Column], width: int
) -> tuple[str, Identity]:
    identity = Identity(
        model="m", tokenizer="t", dataset="d", examples=len(tokens), positions="all",
        dtype="float32", compute_dtype="float32", width=width, shard_examples=4,
    )  # fmt: skip
    store = ActivationStore(path, identity)
    loaded = load_model(model, dtype="float32")
    for shard, wanted in store.missing(columns).items():
        extract_shard(
            loaded,
            store,
            shard,
            wanted,
            [tokens[e] for e in store.shard_of(shard)],
            batch_tokens=500,
        )
    store.commit(columns)
    return str(path), identity


@pytest.fixture(scope="module")
def job(
    family: dict[str, Path], tokens: list[Tokens], tmp_path_factory: pytest.TempPathFactory
) -> TrainJob:
    folder = tmp_path_factory.mktemp("job")
    transport = folder / "transport.safetensors"
    said = [Column(3, "mlp"), final_column(5)]
    torch.manual_seed(0)
    Transport(torch.randn(32, 48)).save(transport)
    return TrainJob(
        student=ModelSpec(path=str(family["student"]), dtype="float32"),
        teacher=ModelSpec(path=str(family["teacher"]), dtype="float32"),
        pairs=(Pair((3,), (1.0,), 1),),
        interfaces=("mlp",),
        adapter="lora",
        lora=Lora(rank=4),
        settings=Hyperparameters(
            epochs=3, lr=1e-2, batch_size=4, micro_batch_size=2, alpha=0.7, beta=1.3
        ),
        transport=str(transport),
        teacher_store=make_store(folder / "t", family["teacher"], tokens, said, 48),
        prefix_store=make_store(folder / "s", family["student"], tokens, [Column(1, "input")], 32),
    )


def with_loss(job: TrainJob, **settings: Any) -> TrainJob:
    """The same job with other hyperparameters, such as another objective."""
    return replace(job, settings=replace(job.settings, **settings))
