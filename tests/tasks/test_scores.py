"""The estimators against their definitions."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from semalign.tasks.scores import pass_at_k, score, wilson_interval


def test_pass_at_k_is_the_share_of_k_subsets_with_a_pass() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([1] * c + [0] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("n", [1, 7, 164, 14042])
@pytest.mark.parametrize("mean", [0.0, 0.01, 0.5, 0.9, 1.0])
def test_wilson_ends_are_where_the_mean_is_z_standard_errors_away(n: int, mean: float) -> None:
    low, high = wilson_interval(mean, n)
    assert 0 <= low <= mean <= high <= 1
    for end in (low, high):
        error = 1.959963984540054 * math.sqrt(end * (1 - end) / n)
        assert abs(mean - end) == pytest.approx(error, abs=1e-12)


def test_score_of_items_with_several_samples() -> None:
    found = score([1.0, 0.5, 0.0, 0.5])
    assert (found.n, found.value) == (4, 0.5)
    assert found.low < 0.5 < found.high
    with pytest.raises(ValueError, match="at least one item"):
        score([])
