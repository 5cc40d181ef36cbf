"""Which layers of two models are alike, against CKA of what the whole models say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from semalign.core.similarity import linear_cka
from semalign.data.tokens import Tokens
from semalign.models.decoder import capture, find_decoder, run_base
from semalign.models.loading import load_model
from semalign.stages import similarity as stage
from semalign.stages.similarity import layer_similarity
from tests.reference import similarity as reference


def blocks(model: Path, tokens: list[Tokens], layers: int) -> list[torch.Tensor]:
    """Each layer's output at all positions of all examples, one example at a time."""
    decoder = find_decoder(load_model(model, dtype="float32"))
    said: list[list[torch.Tensor]] = [[] for _ in range(layers)]
    for example in tokens:
        ids = torch.tensor([example.ids])
        wanted = [(layer, "block") for layer in range(layers)]
        with torch.no_grad(), capture(decoder, wanted) as seen:
            run_base(decoder, ids, torch.ones_like(ids))
        for layer in range(layers):
            said[layer].append(seen[layer, "block"][0])
    return [torch.cat(parts) for parts in said]


def measure(family: dict[str, Path], tokens: list[Tokens], batch_size: int) -> list[list[float]]:
    models = [load_model(family[name], dtype="float32") for name in ("teacher", "student")]
    return layer_similarity(*models, tokens, tokens, batch_size=batch_size)


def test_one_batch_is_the_unbiased_cka_of_all_positions(
    family: dict[str, Path], tokens: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tokens[:2]
    found = torch.tensor(measure(family, few, batch_size=2))
    assert found.shape == (5, 3)
    teacher, student = blocks(family["teacher"], few, 5), blocks(family["student"], few, 3)
    for i, j in ((0, 0), (4, 1), (2, 2)):
        expected = reference.minibatch_cka([(teacher[i], student[j])])
        assert found[i, j].item() == pytest.approx(expected, abs=1e-5)


def test_batches_of_drawn_positions_come_near_the_exact_cka(
    family: dict[str, Path], tokens: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_ROWS", 120)
    found = torch.tensor(measure(family, tokens, batch_size=3))
    again = torch.tensor(measure(family, tokens, batch_size=3))
    torch.testing.assert_close(found, again, atol=1e-6, rtol=0)  # the same positions
    teacher, student = blocks(family["teacher"], tokens, 5), blocks(family["student"], tokens, 3)
    exact = torch.tensor([[linear_cka(x, y).item() for y in student] for x in teacher])
    torch.testing.assert_close(found.float(), exact.float(), atol=0.1, rtol=0)


def test_a_model_is_most_like_itself(family: dict[str, Path], tokens: list[Tokens]) -> None:
    found = torch.tensor(
        layer_similarity(
            *(load_model(family["teacher"], dtype="float32") for _ in range(2)),
            tokens,
            tokens,
            batch_size=4,
        )
    )
    torch.testing.assert_close(found.diagonal(), torch.ones(5), atol=1e-5, rtol=0)
    assert found.argmax(dim=1).tolist() == list(range(5))
