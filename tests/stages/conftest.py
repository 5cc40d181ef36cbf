"""A dataset of the zoo's GSM8K rows as token ids, and an update of the student on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from semalign import zoo
from semalign.artifacts.activations import Column
from semalign.artifacts.artifact import Workspace
from semalign.artifacts.host import Host
from semalign.config.sections import Alignment, Extraction, Lora, Loss, Training
from semalign.core.pairing import Pair
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens, tokenise
from semalign.models.loading import load_tokenizer
from semalign.models.reference import Model
from semalign.models.vocabulary import vocabulary_overlap
from semalign.stages.adaptation import LoraAdaptation
from semalign.stages.extraction import Activations, Prefix
from semalign.stages.mapping import Map, Transport
from semalign.stages.supervision import final_column
from semalign.stages.update import Update
from semalign.tasks import load_split

EXTRACTION = Extraction(dtype="float32", shard_examples=4, batch_tokens=500)

Store = TypeVar("Store", bound=Activations)


@pytest.fixture(scope="session")
def tokens(family: dict[str, Path]) -> list[Tokens]:
    examples = load_split(zoo.path("zoo/data"), "gsm8k", "extract")[:10]
    return tokenise(examples, load_tokenizer(family["student"]), max_length=512)


def stored(
    workspace: Workspace,
    model: Model,
    tokens: Sequence[Tokens],
    columns: Sequence[Column],
    kind: type[Store],
) -> Store:
    """A store of all positions in float32, made."""
    found = kind(
        model=model,
        rows=Dataset(tokens),
        columns=frozenset(columns),
        positions="all",
        dtype="float32",
        extraction=EXTRACTION,
    )
    workspace.ensure(found, lambda folder: found.make(folder, Host(workspace)))
    return found


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def models(family: dict[str, Path]) -> dict[str, Model]:
    return {name: Model.open(str(path), dtype="float32") for name, path in family.items()}


@pytest.fixture(scope="module")
def update(models: dict[str, Model], tokens: list[Tokens], workspace: Workspace) -> Update:
    """Student layer 2 (counted from 1) learns from teacher layer 4 through a random map."""
    student, teacher = models["student"], models["teacher"]
    tokenizer = load_tokenizer(student.path)
    shared = vocabulary_overlap(tokenizer, tokenizer)
    mapping = Map(student=student, teacher=teacher, shared=shared, alignment=Alignment())
    torch.manual_seed(0)
    Transport(torch.randn(32, 48)).save(workspace.place(mapping) / "map.safetensors")
    columns = [Column(3, "mlp"), final_column(5)]
    return Update(
        name="test",
        student=student,
        rows=Dataset(tokens),
        labelled=None,
        adaptation=LoraAdaptation((1,), Lora(rank=4), 0),
        loss=Loss(alpha=0.7, beta=1.3),
        training=Training(epochs=3, lr=1e-2, batch_size=4, micro_batch_size=2),
        extraction=EXTRACTION,
        seed=0,
        pairs=(Pair((3,), (1.0,), 1),),
        prefix=stored(workspace, student, tokens, [Column(1, "input")], Prefix),
        teacher=teacher,
        targets=stored(workspace, teacher, tokens, columns, Activations),
        map=mapping,
        shared=shared,
    )


def with_loss(update: Update, **settings: Any) -> Update:
    """The same update with another loss, such as another objective."""
    return replace(update, loss=update.loss.model_copy(update=settings))


def with_training(update: Update, **settings: Any) -> Update:
    return replace(update, training=update.training.model_copy(update=settings))
