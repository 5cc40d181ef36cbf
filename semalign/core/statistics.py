"""Scores with their uncertainty, and whether two of them on the same items differ.

Strings and numbers only: accuracy, pass@k, Wilson's interval, McNemar's test, paired bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from semalign.errors import UserError

_Number = float | int  # a float takes an int too, but not for the type checks of the tests

_Z95 = 1.959963984540054  # the standard normal's 97.5% quantile


@dataclass(frozen=True)
class Score:
    """A mean over ``n`` items, as a fraction, with its standard error and 95% interval; of a
    corpus the mean log-probability of a byte.

    The standard error is that of lm_eval: the items' standard deviation (n - 1 in the denominator)
    over sqrt(n). One item has none: it is NaN then.
    """

    n: int
    value: float
    stderr: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A mean difference over items, second minus first, its 95% interval and two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two candidates on the same ``n`` items: second minus first as a fraction, its 95% interval
    by paired bootstrap, and the two-sided p-value of ``test``.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    test: Literal["McNemar", "paired bootstrap"]


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


def score(per_item: Sequence[_Number]) -> Score:
    """The mean of per-item scores.

    Of scores in [0, 1] the interval is Wilson's. Items scored by several samples lie between 0 and
    1; their variance is at most that of a proportion of the same mean, so the interval is then
    conservative. Of others, such as log-probabilities, it is the normal one.
    """
    n = len(per_item)
    if not n:
        raise ValueError("a score needs at least one item")
    mean = math.fsum(per_item) / n
    stderr = _standard_error(per_item, mean)
    if all(0 <= value <= 1 for value in per_item):
        low, high = wilson_interval(mean, n)
    else:
        low, high = mean - _Z95 * stderr, mean + _Z95 * stderr
    return Score(n=n, value=mean, stderr=stderr, low=low, high=high)


def _standard_error(values: Sequence[_Number], mean: float) -> float:
    n = len(values)
    if n == 1:
        return math.nan
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value of McNemar's exact test on paired right and wrong answers.

    If both were equally good, each of the b + c items that only one gets right would be either's
    with probability 1/2: p = min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2), in exact
    integers. Without such items it is 1.
    """
    pairs = list(zip(first, second, strict=True))
    fewer, more = sorted((sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)))
    n, term, tail = fewer + more, 1, 0
    for i in range(fewer + 1):  # term is C(n, i)
        tail += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2**n)


def paired_bootstrap(
    first: Sequence[_Number], second: Sequence[_Number], *, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """The mean of second - first over items, and its variation when items are drawn again.

    n items are drawn from the n with replacement, ``resamples`` times (Efron & Tibshirani 1993).
    The interval goes from the 2.5% to the 97.5% percentile of the R resampled means m; its inverse
    is p = min(1, 2 (1 + min(#{m <= 0}, #{m >= 0})) / (R + 1)). The same seed gives the same
    numbers. With fewer than about 20 items neither is reliable: of one item the interval has no
    width.

    What is drawn is how often each distinct difference occurs, a multinomial, which is the same
    distribution: time and memory (8 bytes each) grow with resamples x distinct differences.
    """
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    if len(first) != len(second) or not len(first):
        raise ValueError(f"pairs are needed, found {len(first)} and {len(second)} items")
    n = len(differences)
    # Rounded, so that 0.3 - 0.1 and 0.2 are one difference, and means of nothing are 0.
    values, counts = np.unique(differences.round(12), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    means = (drawn @ values / n).round(12)
    low, high = np.quantile(means, [0.025, 0.975])
    least = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return PairedDifference(
        mean=math.fsum(differences) / n,
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * (1 + least) / (resamples + 1)),
    )


def compare(
    first: Mapping[str, _Number], second: Mapping[str, _Number], *, metric: str
) -> Comparison:
    """Two candidates' per-item scores, by item id, on the same items: second minus first.

    The p-value is McNemar's for ``accuracy`` with answers that are right or wrong, and the paired
    bootstrap's otherwise: for pass@k, and for accuracies averaged over samples.

    **Raises** `UserError` with the first item that only one of them has.
    """
    if odd := [id for id in (*first, *second) if (id in first) != (id in second)]:
        side = "first" if odd[0] in first else "second"
        raise UserError(
            f"only the {side} candidate was asked '{odd[0]}' ({len(odd)} such items); a comparison "
            "needs the same items"
        )
    if not first:
        raise UserError("no items to compare; expected records of both candidates")
    a, b = list(first.values()), [second[id] for id in first]
    found = paired_bootstrap(a, b)
    exact = metric == "accuracy" and {*a, *b} <= {0, 1}
    return Comparison(
        n=len(a),
        difference=found.mean,
        low=found.low,
        high=found.high,
        p=mcnemar([x == 1 for x in a], [x == 1 for x in b]) if exact else found.p,
        test="McNemar" if exact else "paired bootstrap",
    )
