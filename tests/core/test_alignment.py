from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from semalign.core.alignment import align, cosine_map, dual_map, recompose, semantic_coefficients
from semalign.core.bases import semantic_bases
from semalign.errors import UserError
from tests.reference import alignment as reference

VOCABULARY, TEACHER, STUDENT = 40, 9, 6


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


HEAD_T, HEAD_S = random(VOCABULARY, TEACHER), random(VOCABULARY, STUDENT, seed=1)
BASES_T, BASES_S = semantic_bases(HEAD_T), semantic_bases(HEAD_S)
H = 5 * random(2, 3, TEACHER, seed=2)


def by_rows(function: object, x: Tensor) -> Tensor:
    rows = [function(row) for row in x.reshape(-1, x.shape[-1])]  # type: ignore[operator]
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


def test_coefficients_equal_equation_1() -> None:
    expected = by_rows(lambda h: reference.coefficients(h, BASES_T), H)
    torch.testing.assert_close(semantic_coefficients(H, BASES_T), expected)


@pytest.mark.parametrize("top_k", [None, 1, 7, VOCABULARY])
def test_recomposition_equals_equation_2(top_k: int | None) -> None:
    a = semantic_coefficients(H, BASES_T)
    expected = by_rows(lambda row: reference.recompose(row, BASES_S, top_k), a)
    torch.testing.assert_close(recompose(a, BASES_S, top_k=top_k), expected)


def test_the_map_equals_the_long_way() -> None:
    short = align(H, cosine_map(BASES_S, BASES_T), normalise=True)
    a = semantic_coefficients(H, BASES_T)
    torch.testing.assert_close(short, recompose(a, BASES_S))
    torch.testing.assert_close(short, recompose(a, BASES_S, top_k=VOCABULARY))


def test_length_of_h_does_not_matter_to_the_cosine_map() -> None:
    matrix = cosine_map(BASES_S, BASES_T)
    torch.testing.assert_close(
        align(1e-3 * H, matrix, normalise=True), align(1e3 * H, matrix, normalise=True)
    )


def test_a_tight_frame_returns_the_direction() -> None:
    # m unit vectors around the circle: sum_i s_i s_i^T = (m / 2) I
    angles = torch.arange(7, dtype=torch.float64) * 2 * math.pi / 7
    frame = torch.stack([angles.cos(), angles.sin()])
    torch.testing.assert_close(cosine_map(frame, frame), 3.5 * torch.eye(2, dtype=torch.float64))
    h = random(5, 2, seed=3)
    found = align(h, cosine_map(frame, frame), normalise=True)
    torch.testing.assert_close(found, 3.5 * h / h.norm(dim=-1, keepdim=True))


def test_a_tight_frame_head_gives_a_tight_frame_of_bases() -> None:
    # orthonormal columns and equal row lengths: W^+ = W^T and S S^T = (V / D) I
    hadamard = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
    for _ in range(2):
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64))
    bases = semantic_bases(hadamard[:, :4])
    torch.testing.assert_close(bases @ bases.T, 2 * torch.eye(4, dtype=torch.float64))


def test_dual_map_equals_least_squares() -> None:
    found = align(H, dual_map(HEAD_S, HEAD_T), normalise=False)
    torch.testing.assert_close(found, by_rows(lambda h: reference.dual(h, HEAD_S, HEAD_T), H))


def test_dual_map_is_the_identity_when_teacher_is_student() -> None:
    eye = torch.eye(TEACHER)
    torch.testing.assert_close(dual_map(HEAD_T.float(), HEAD_T.float()), eye)
    cosine = cosine_map(BASES_T, BASES_T)
    assert not torch.allclose(cosine / cosine.trace() * TEACHER, eye.double(), atol=1e-2)


def test_dual_map_inverts_a_change_of_basis() -> None:
    # the student's latent space is the teacher's, seen in other coordinates: h_S = R h_T
    change = random(TEACHER, TEACHER, seed=4)
    student = HEAD_T @ torch.linalg.inv(change)
    torch.testing.assert_close(align(H, dual_map(student, HEAD_T), normalise=False), H @ change.T)


def test_orthonormal_heads_by_hand() -> None:
    # two tokens, teacher axes swapped in the student: the map swaps them back, at unit length
    teacher = torch.eye(2, dtype=torch.float64)
    matrix = cosine_map(semantic_bases(teacher.flip(0)), semantic_bases(teacher))
    h = torch.tensor([3.0, 4.0], dtype=torch.float64)
    expected = torch.tensor([0.8, 0.6], dtype=torch.float64)
    torch.testing.assert_close(align(h, matrix, normalise=True), expected)


def test_zero_and_bfloat16_inputs() -> None:
    matrix = cosine_map(BASES_S.float(), BASES_T.float())
    assert align(torch.zeros(1, TEACHER), matrix, normalise=True).abs().max() == 0
    stored = H.to(torch.bfloat16)
    found = align(stored, matrix, normalise=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, align(stored.float(), matrix, normalise=True))


@pytest.mark.parametrize("top_k", [0, VOCABULARY + 1])
def test_strength_out_of_range_is_refused(top_k: int) -> None:
    with pytest.raises(UserError, match=f"top_k {top_k} is out of range"):
        recompose(semantic_coefficients(H, BASES_T), BASES_S, top_k=top_k)
