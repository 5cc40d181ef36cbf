"""Scores with their uncertainty: accuracy, pass@k, and Wilson's 95% interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z95 = 1.959963984540054  # the standard normal's 97.5% quantile


@dataclass(frozen=True)
class Score:
    """A mean over ``n`` items, as a fraction, with its 95% interval."""

    n: int
    value: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of pass@k from ``c`` passes in ``n`` samples, 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021, Eq. 1, in exact integers. For k = 1 it is c / n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, found n={n} c={c} k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson_interval(mean: float, n: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion ``mean`` over ``n`` items (Wilson 1927)."""
    if n < 1 or not 0.0 <= mean <= 1.0:
        raise ValueError(f"an interval needs n >= 1 and a mean in [0, 1], found n={n} mean={mean}")
    denominator = 1.0 + z * z / n
    centre = (mean + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(mean * (1.0 - mean) / n + z * z / (4 * n * n))
    # At a mean of 0 or 1 the exact end is that mean itself; rounding must not move it.
    return (
        0.0 if mean == 0.0 else max(0.0, centre - half),
        1.0 if mean == 1.0 else min(1.0, centre + half),
    )


def score(per_item: Sequence[float]) -> Score:
    """The mean of per-item scores in [0, 1].

    Items scored by several samples lie between 0 and 1; their variance is at most that of a
    proportion of the same mean, so the interval is then conservative.
    """
    if not per_item:
        raise ValueError("a score needs at least one item")
    mean = math.fsum(per_item) / len(per_item)
    low, high = wilson_interval(mean, len(per_item))
    return Score(n=len(per_item), value=mean, low=low, high=high)
