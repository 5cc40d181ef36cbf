from __future__ import annotations

import pytest
import torch
from torch import Tensor

from semalign.core.bases import pseudoinverse, semantic_bases
from semalign.errors import UserError
from tests.reference import alignment as reference


def head(rows: int = 60, width: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, dtype=torch.float64, generator=generator)


def assert_is_pinv(weight: Tensor, **tolerance: float) -> None:
    expected = torch.linalg.pinv(weight.double())
    torch.testing.assert_close(pseudoinverse(weight), expected, **tolerance)


def test_pseudoinverse_equals_pinv() -> None:
    assert_is_pinv(head())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_heads_are_inverted_in_float64(dtype: torch.dtype) -> None:
    assert_is_pinv(head().to(dtype))
    assert semantic_bases(head().to(dtype)).dtype == torch.float32


def test_rank_deficient_heads_fall_back_to_the_pinv() -> None:
    weight = head()
    weight[:, 3] = 2 * weight[:, 1] - weight[:, 0]
    assert_is_pinv(weight)
    weight[:, 5] = 0
    assert_is_pinv(weight)


def test_a_rank_lost_to_float32_rounding_is_not_inverted() -> None:
    weight = (head(60, 5) @ head(5, 12, seed=1)).float()
    expected = torch.linalg.pinv(weight.double(), rtol=1e-6)
    torch.testing.assert_close(pseudoinverse(weight), expected)
    assert torch.linalg.matrix_rank(pseudoinverse(weight)) == 5


def test_fewer_tokens_than_dimensions() -> None:
    assert_is_pinv(head(7, 12))


@pytest.mark.parametrize("condition", [1e4, 1e6, 1e9])
def test_ill_conditioned_heads(condition: float) -> None:
    u, _, vh = torch.linalg.svd(head(), full_matrices=False)
    scales = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 12).double()
    assert_is_pinv((u * scales) @ vh, rtol=1e-5, atol=1e-6 * condition)


def test_moore_penrose_conditions() -> None:
    for weight in (head(), head(7, 12), torch.cat([head()] * 2, dim=1)):
        inverse = pseudoinverse(weight)
        torch.testing.assert_close(weight @ inverse @ weight, weight)
        torch.testing.assert_close(inverse @ weight @ inverse, inverse)
        torch.testing.assert_close((weight @ inverse).T, weight @ inverse)
        torch.testing.assert_close((inverse @ weight).T, inverse @ weight)


def test_semantic_bases_equal_the_paper_token_by_token() -> None:
    weight = head()
    torch.testing.assert_close(semantic_bases(weight), reference.semantic_bases(weight))


def test_bases_have_unit_columns_and_zero_rows_stay_zero() -> None:
    weight = head().float()
    weight[4] = 0  # a padded vocabulary row
    lengths = semantic_bases(weight).norm(dim=0)
    expected = torch.ones(60)
    expected[4] = 0
    torch.testing.assert_close(lengths, expected)


def test_an_orthonormal_head_is_its_own_basis() -> None:
    orthonormal, _ = torch.linalg.qr(head(12, 12))
    torch.testing.assert_close(semantic_bases(orthonormal), orthonormal.T)


def test_a_head_with_nan_is_refused() -> None:
    weight = head()
    weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="holds NaN"):
        pseudoinverse(weight)


def test_the_head_need_not_be_detached() -> None:
    assert not semantic_bases(head().requires_grad_()).requires_grad
