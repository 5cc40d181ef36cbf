"""How alike two layers represent the same rows: linear CKA (section 5.3).

N rows (positions), D1 and D2 widths. All sums are taken in float64, whatever the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from semalign.errors import UserError

_MIN_ROWS = 4  # HSIC_1 divides by N - 3
# A centred matrix below this share of the matrix itself is the rounding error of a constant one.
_ROUNDING = 32 * torch.finfo(torch.float64).eps


def linear_cka(x: Float[Tensor, "N D1"], y: Float[Tensor, "N D2"]) -> Float[Tensor, ""]:
    """CKA(x, y) = |Yc^T Xc|^2 / (|Xc^T Xc| |Yc^T Yc|), Frobenius norms, columns centred.

    Kornblith et al. 2019 (section 3); float64, in 0..1, and 0 where x or y is the same in all rows.
    Cost: 2 N (D1 D2 + D1^2 + D2^2) operations and no N x N matrix where that would be the larger
    one; where N is small 6 N^2 (D1 + D2), through the Gram matrices. Differentiable.
    """
    x, y = _unit(x), _unit(y)
    squares = _gram_product(x, x) * _gram_product(y, y)
    return _gram_product(x, y) / squares.clamp(min=torch.finfo(torch.float64).tiny).sqrt()


def _unit(x: Tensor) -> Tensor:
    """Columns centred, at Frobenius norm 1, so that nothing can overflow: CKA does not depend on
    scale. Zeros for a constant matrix.
    """
    wide = x.to(torch.float64)
    centred = wide - wide.mean(dim=0)
    norm, floor = centred.norm(), _ROUNDING * wide.detach().norm()
    return torch.where(norm > floor, centred, 0.0) / norm.clamp(min=1e-300)


def _gram_product(x: Tensor, y: Tensor) -> Tensor:
    """<X X^T, Y Y^T> = |Y^T X|^2, by the smaller matrices."""
    rows = x.shape[0]
    if rows * rows < x.shape[1] * y.shape[1]:
        return ((x @ x.T) * (y @ y.T)).sum()
    return (y.T @ x).square().sum()


def unbiased_hsic(x: Float[Tensor, "N D1"], y: Float[Tensor, "N D2"]) -> Float[Tensor, ""]:
    """HSIC_1 of the linear kernels K = X X^T and L = Y Y^T (Song et al. 2007).

    With K~, L~ for K, L without their diagonals, HSIC_1 is
    (tr K~ L~ + 1^T K~ 1 1^T L~ 1 / ((N-1)(N-2)) - 2 / (N-2) 1^T K~ L~ 1) / (N (N-3)).
    It does not change when columns are shifted, so they are centred first: then K 1 = 0, and with
    a, b the diagonals of K, L three sums are left: tr K~ L~ = |Y^T X|^2 - a^T b, K~ 1 = -a, and
    L~ 1 = -b. Cost: 2 N D1 D2 operations; where N^2 < D1 D2 2 N^2 (D1 + D2), by N x N matrices.

    **Raises** `UserError` for fewer than 4 rows.
    """
    n = x.shape[0]
    if n < _MIN_ROWS:
        raise UserError(f"unbiased HSIC needs batches of at least {_MIN_ROWS} rows, found {n}")
    x, y = (z.to(torch.float64) - z.to(torch.float64).mean(dim=0) for z in (x, y))
    a, b = x.square().sum(dim=1), y.square().sum(dim=1)
    inner, outer = a @ b, a.sum() * b.sum()
    total = _gram_product(x, y) - inner * n / (n - 2) + outer / ((n - 1) * (n - 2))
    return total / (n * (n - 3))


def _narrow(x: Tensor) -> Tensor:
    """x, or N x N where D is larger: X^T = Q R gives X X^T = R^T R, and a linear kernel depends on
    nothing else.
    """
    wide = x.to(torch.float64)
    return wide if x.shape[0] >= x.shape[1] else torch.linalg.qr(wide.T, mode="r").R.T


class MinibatchCKA:
    """Linear CKA of each of some layers with each of others, from batches of rows.

    Nguyen et al. 2021: mean HSIC_1(x, y) over the root of mean HSIC_1(x, x) times mean
    HSIC_1(y, y). Every batch counts the same, so batches should be of one size; the estimate of
    HSIC is unbiased whatever that size. Cost a batch, with d = min(N, D): 2 N d^2 operations a pair
    of layers, and 4 N^2 D a layer with N < D; memory: N d numbers a layer in float64.
    """

    def __init__(self, num_x: int, num_y: int) -> None:
        self._cross = torch.zeros(num_x, num_y, dtype=torch.float64)
        self._x = torch.zeros(num_x, dtype=torch.float64)
        self._y = torch.zeros(num_y, dtype=torch.float64)

    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """Add one batch: a matrix (N, D) for each layer, with the same N rows in the same order.

        **Raises** `UserError` for fewer than 4 rows.
        """
        xs, ys = ([_narrow(z.detach()) for z in zs] for zs in (xs, ys))
        cross = [torch.stack([unbiased_hsic(x, y) for y in ys]) for x in xs]
        self._cross += torch.stack(cross).cpu()
        self._x += torch.stack([unbiased_hsic(x, x) for x in xs]).cpu()
        self._y += torch.stack([unbiased_hsic(y, y) for y in ys]).cpu()

    def matrix(self) -> Float[Tensor, "L1 L2"]:
        """CKA of the batches so far; 0 where a layer is the same in all rows of each batch."""
        product = self._x.clamp(min=0)[:, None] * self._y.clamp(min=0)
        return torch.where(product > 0, self._cross / product.sqrt(), 0.0)
