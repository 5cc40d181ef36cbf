"""The transport of a whole store: one matrix, the long way, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from semalign.artifacts.activations import Reader
from semalign.config.sections import Loss
from semalign.core.bases import semantic_bases
from semalign.core.pairing import Pair
from semalign.data.tokens import Tokens
from semalign.models.heads import read_lm_head
from semalign.stages.mapping import MAPS, Transport
from semalign.stages.supervision import Target, teacher_columns
from tests.reference import alignment as reference


@pytest.fixture(scope="module")
def heads(family: dict[str, Path]) -> tuple[torch.Tensor, torch.Tensor]:
    return read_lm_head(str(family["student"])), read_lm_head(str(family["teacher"]))


def build(
    heads: tuple[torch.Tensor, torch.Tensor], name: str, top_k: int | None = None
) -> Transport:
    """From the bases of both heads, or from the heads themselves for a map that uses no bases."""
    sides = [semantic_bases(head) for head in heads] if MAPS[name].uses_bases else heads
    return Transport.build(*sides, MAPS[name], top_k=top_k)


def test_matrix_and_long_way_agree_with_the_literal_equations(
    heads: tuple[torch.Tensor, torch.Tensor],
) -> None:
    h = torch.randn(3, 48)
    bases = [reference.semantic_bases(head) for head in heads]
    for top_k in (None, 5, len(heads[0])):
        aligned = build(heads, "cosine", top_k)(h)
        for row, found in zip(h, aligned, strict=True):
            coefficients = reference.coefficients(row.double(), bases[1])
            literal = reference.recompose(coefficients, bases[0], top_k)
            torch.testing.assert_close(found, literal.float(), rtol=1e-4, atol=1e-5)


def test_dual_is_least_squares_of_the_teachers_logits(
    heads: tuple[torch.Tensor, torch.Tensor],
) -> None:
    h = torch.randn(48)
    found = build(heads, "dual")(h)
    torch.testing.assert_close(found, reference.dual(h, *heads).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("map", "top_k"), [("cosine", None), ("cosine", 7), ("dual", None)])
def test_saved_and_loaded(
    heads: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, map: str, top_k: int | None
) -> None:
    transport = build(heads, map, top_k)
    transport.save(tmp_path / "t.safetensors")
    h = torch.randn(2, 48)
    loaded = Transport.load(tmp_path / "t.safetensors")
    torch.testing.assert_close(loaded(h), transport(h))
    assert (loaded.top_k, loaded.normalise) == (transport.top_k, transport.normalise)


@pytest.mark.parametrize("top_k", [None, 7])
def test_one_map_has_one_file(
    heads: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, top_k: int | None
) -> None:
    """Equal to the byte, whatever order the library keeps metadata in."""
    transport = build(heads, "cosine", top_k)
    for number in range(16):
        transport.save(tmp_path / f"{number}.safetensors")
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_targets_mix_teacher_layers() -> None:
    rows = [Tokens("a", (1, 2), 1), Tokens("b", (3,), 1)]
    counts = [len(row.ids) for row in rows]
    low, high = (Reader([torch.full((3, 4), value)], counts, 2) for value in (1.0, 3.0))
    target = Target(student=0, interface="mlp", readers=(low, high), weights=(0.25, 0.75))
    cpu = torch.device("cpu")
    assert target.mixed(target.stored([1, 0], cpu)).shape == (3, 4)
    assert target.mixed(target.stored([0], cpu)).unique().tolist() == [2.5]


def columns(
    loss: Loss, interfaces: tuple[str, ...] = ("mlp",), extra: tuple[int, ...] = ()
) -> list[str]:
    pairs = [Pair((2, 3), (0.5, 0.5), 1), Pair((3,), (1.0,), 2)]
    found = teacher_columns(pairs, loss, interfaces, num_layers=5, extra_layers=extra)
    assert found == sorted(found)
    return [str(column) for column in found]


def test_columns_are_the_union_of_what_the_loss_needs() -> None:
    assert columns(Loss()) == ["mlp.2", "mlp.3"]
    assert columns(Loss(), ("attn", "mlp")) == ["attn.2", "mlp.2", "attn.3", "mlp.3"]
    assert columns(Loss(), extra=(0, 3)) == ["mlp.0", "mlp.2", "mlp.3"]
    assert columns(Loss(gamma=1)) == ["mlp.2", "mlp.3", "final.4"]
    assert columns(Loss(objective="fisher")) == ["mlp.2", "mlp.3"]
    assert columns(Loss(alpha=0, gamma=1)) == ["final.4"]
    assert columns(Loss(alpha=0)) == []
    assert columns(Loss(alpha=0), extra=(1,)) == ["mlp.1"]
