from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from semalign.core.similarity import MinibatchCKA, linear_cka, unbiased_hsic
from semalign.errors import UserError
from tests.reference import similarity as reference


def related(rows: int, *widths: int, seed: int = 0) -> list[Tensor]:
    """Matrices of those widths that share a part, with means far from 0."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, 3, dtype=torch.float64, generator=generator)
    made = []
    for width in widths:
        mix = torch.randn(3, width, dtype=torch.float64, generator=generator)
        noise = torch.randn(rows, width, dtype=torch.float64, generator=generator)
        made.append(shared @ mix + noise + 5)
    return made


def rotation(width: int) -> Tensor:
    q, _ = torch.linalg.qr(related(width, width, seed=9)[0])
    return q


# more rows than dimensions (feature space), fewer (Gram space), and one of each kind of factor
SHAPES = [(40, 5, 7), (6, 20, 9), (12, 30, 2), (2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_cka_equals_its_literal_gram_form(shape: tuple[int, int, int]) -> None:
    x, y = related(*shape)
    assert linear_cka(x, y).item() == pytest.approx(reference.linear_cka(x, y), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_cka_is_one_of_itself_and_knows_no_rotation_scale_or_shift(
    shape: tuple[int, int, int],
) -> None:
    x, y = related(*shape)
    assert linear_cka(x, x).item() == pytest.approx(1)
    moved = 0.3 * x @ rotation(x.shape[1]) - 11
    assert linear_cka(moved, x).item() == pytest.approx(1)
    assert linear_cka(moved, y).item() == pytest.approx(linear_cka(x, y).item())
    assert linear_cka(y, x).item() == pytest.approx(linear_cka(x, y).item())


def test_cka_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    y = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    # X^T X = 2 I, Y^T Y = 2, Y^T X = (2, 0): 4 / (sqrt(8) * 2)
    assert linear_cka(x, y).item() == pytest.approx(2**-0.5)
    assert linear_cka(y, torch.tensor([[0.0], [0.0], [1.0], [-1.0]])).item() == 0


def test_cka_of_a_constant_is_zero_with_a_finite_gradient() -> None:
    y = related(37, 4)[0]
    row = torch.tensor([0.1, 1 / 3, 1e5 / 7], dtype=torch.float64)  # whose means are not exact
    for value in (0.0, 1.0):
        x = (value * row).repeat(37, 1).requires_grad_()
        found = linear_cka(x, y)
        found.backward()
        assert found.item() == 0
        assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cka_neither_overflows_nor_underflows(scale: float) -> None:
    x, y = related(20, 4, 4)
    found = linear_cka((x * scale).float(), (y / scale).float())
    assert found.item() == pytest.approx(linear_cka(x, y).item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 4, 3), (4, 9, 3)])
def test_cka_gradient_equals_finite_differences(shape: tuple[int, int, int]) -> None:
    x, y = related(*shape)
    assert torch.autograd.gradcheck(linear_cka, (x.requires_grad_(), y.requires_grad_()))


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_matrix_of_all_pairs_of_rows() -> None:
    x, y = related(3000, 6, 8)
    with Largest() as seen:
        linear_cka(x, y)
        unbiased_hsic(x, y)
    assert seen.numel == 3000 * 8


@pytest.mark.parametrize("shape", [(40, 5, 7), (6, 20, 9), (4, 2, 3)])
def test_hsic_equals_its_literal_form(shape: tuple[int, int, int]) -> None:
    x, y = related(*shape)
    found = unbiased_hsic(x, y).item()
    assert found == pytest.approx(reference.hsic_1(x, y), rel=1e-8)
    assert unbiased_hsic(x + 100, y).item() == pytest.approx(found, rel=1e-8)


def test_hsic_is_unbiased() -> None:
    """The mean over all 5-row subsets of 8 rows is the estimate from the 8 rows themselves."""
    x, y = related(8, 3, 2)
    subsets = torch.combinations(torch.arange(8), 5)
    mean = torch.stack([unbiased_hsic(x[rows], y[rows]) for rows in subsets]).mean()
    torch.testing.assert_close(mean, unbiased_hsic(x, y))


def test_minibatch_cka_equals_its_literal_form() -> None:
    layers_x, layers_y = related(24, 5, 4), related(24, 6, 3, 7)
    cka = MinibatchCKA(2, 3)
    for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
        cka.update([x[rows] for x in layers_x], [y[rows] for y in layers_y])
    for i, x in enumerate(layers_x):
        for j, y in enumerate(layers_y):
            batches = list(zip(x.split(8), y.split(8), strict=True))
            expected = reference.minibatch_cka(batches)
            assert cka.matrix()[i, j].item() == pytest.approx(expected, rel=1e-8)


def test_one_batch_is_the_unbiased_formula() -> None:
    x, y = related(10, 4, 30)
    cka = MinibatchCKA(1, 1)
    cka.update([x], [y])
    hsic = reference.hsic_1
    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5
    assert cka.matrix().item() == pytest.approx(expected, rel=1e-8)


def test_wide_layers_are_narrowed_to_the_rows_of_a_batch() -> None:
    wide = related(8, 300, 500)
    cka = MinibatchCKA(2, 2)
    with Largest() as seen:
        cka.update([x.float() for x in wide], wide)
    assert seen.numel == 8 * 500  # nothing of width x width
    for i, x in enumerate(wide):
        for j, y in enumerate(wide):
            expected = reference.minibatch_cka([(x, y)])
            assert cka.matrix()[i, j].item() == pytest.approx(expected, rel=1e-5)


def test_minibatch_cka_nears_the_exact_one() -> None:
    x, y = related(8000, 6, 5)
    cka = MinibatchCKA(2, 1)
    for part_x, part_y in zip(x.split(50), y.split(50), strict=True):
        cka.update([part_x, part_y], [part_y])
    exact = linear_cka(x, y).item()
    assert 0.2 < exact < 0.9
    assert cka.matrix()[0, 0].item() == pytest.approx(exact, abs=0.01)
    assert cka.matrix()[1, 0].item() == pytest.approx(1)


def test_a_constant_layer_is_like_none() -> None:
    x, y = related(12, 3, 4)
    cka = MinibatchCKA(2, 1)
    cka.update([torch.zeros(12, 5), x], [y])
    assert cka.matrix()[0, 0].item() == 0
    assert cka.matrix().isfinite().all()


def test_bfloat16_activations_are_summed_in_float64() -> None:
    x, y = (z.to(torch.bfloat16) for z in related(500, 6, 8))
    assert linear_cka(x, y).item() == linear_cka(x.double(), y.double()).item()
    assert unbiased_hsic(x, y).item() == unbiased_hsic(x.double(), y.double()).item()


def test_too_few_rows_are_refused() -> None:
    x, y = related(3, 2, 2)
    with pytest.raises(UserError, match="at least 4 rows, found 3"):
        MinibatchCKA(1, 1).update([x], [y])
