"""Estimators and tests by brute force: every subset, every sign, every resample, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product


def pass_at_k(n: int, c: int, k: int) -> Fraction:
    """The share of k-subsets of n samples, c of them passing, in which one passes."""
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    return Fraction(sum(any(subset) for subset in subsets), len(subsets))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Fraction:
    """The share of all ways to give out the discordant items that are as lopsided as the found."""
    discordant = [a for a, b in zip(first, second, strict=True) if a != b]
    ways = list(product([False, True], repeat=len(discordant)))
    found = abs(2 * sum(discordant) - len(discordant))
    return Fraction(sum(abs(2 * sum(w) - len(w)) >= found for w in ways), len(ways))


def resampled_means(first: Sequence[Fraction], second: Sequence[Fraction]) -> list[Fraction]:
    """The mean differences of all n^n resamples, sorted."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return sorted(
        sum(drawn) / len(drawn) for drawn in product(differences, repeat=len(differences))
    )


def bootstrap_p(means: Sequence[Fraction]) -> Fraction:
    """Twice the smaller share of means on one side of 0, those at 0 counted with both."""
    below, above = sum(m <= 0 for m in means), sum(m >= 0 for m in means)
    return min(Fraction(1), Fraction(2 * min(below, above), len(means)))
