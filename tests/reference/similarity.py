"""CKA and HSIC as printed: N x N Gram matrices, a centring matrix, vectors of ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gram(x: Tensor) -> Tensor:
    """K_ij = <x_i, x_j>, entry by entry."""
    rows = x.double().tolist()
    return torch.tensor(
        [[sum(p * q for p, q in zip(a, b, strict=True)) for b in rows] for a in rows],
        dtype=torch.float64,
    )


def hsic(k: Tensor, gram_y: Tensor) -> float:
    """tr(K H L H) / (n - 1)^2 with H = I - 1 1^T / n."""
    n = len(k)
    h = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64) / n
    return float(torch.trace(k @ h @ gram_y @ h)) / (n - 1) ** 2


def linear_cka(x: Tensor, y: Tensor) -> float:
    k, gram_y = gram(x), gram(y)
    return hsic(k, gram_y) / math.sqrt(hsic(k, k) * hsic(gram_y, gram_y))


def hsic_1(x: Tensor, y: Tensor) -> float:
    """Song et al.'s unbiased estimator, on Gram matrices whose diagonal is set to zero."""
    k, gram_y = gram(x).fill_diagonal_(0), gram(y).fill_diagonal_(0)
    n = len(k)
    one = torch.ones(n, dtype=torch.float64)
    total = torch.trace(k @ gram_y)
    total = total + (one @ k @ one) * (one @ gram_y @ one) / ((n - 1) * (n - 2))
    total = total - 2 / (n - 2) * (one @ k @ gram_y @ one)
    return float(total) / (n * (n - 3))


def minibatch_cka(batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Nguyen et al.'s estimator from batches (x, y)."""
    xy = sum(hsic_1(x, y) for x, y in batches) / len(batches)
    xx = sum(hsic_1(x, x) for x, _ in batches) / len(batches)
    yy = sum(hsic_1(y, y) for _, y in batches) / len(batches)
    return xy / (math.sqrt(xx) * math.sqrt(yy))
