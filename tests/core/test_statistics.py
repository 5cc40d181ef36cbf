"""The estimators and tests against their definitions."""

from __future__ import annotations

import math
import random
import statistics
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semalign.core.statistics import (
    compare,
    mcnemar,
    paired_bootstrap,
    pass_at_k,
    score,
    wilson_interval,
)
from semalign.errors import UserError
from tests.reference import scores as reference

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=10)


def test_pass_at_k_is_the_share_of_k_subsets_with_a_pass() -> None:
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                assert pass_at_k(n, c, k) == pytest.approx(float(reference.pass_at_k(n, c, k)))


@given(n=st.integers(1, 200), data=st.data())
def test_pass_at_k_grows_with_passes_and_with_k(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    value = pass_at_k(n, c, k)
    assert 0 <= value <= 1 and pass_at_k(n, c, 1) == pytest.approx(c / n)
    assert pass_at_k(n, max(0, c - 1), k) <= value <= pass_at_k(n, c, min(n, k + 1))
    assert (value == 0) == (c == 0) and (c + k <= n or value == 1)


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
    assert found.stderr == pytest.approx(math.sqrt(0.5 / 3 / 4))
    assert found.low < 0.5 < found.high
    with pytest.raises(ValueError, match="at least one item"):
        score([])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_the_standard_error_is_the_sample_deviation_over_root_n(values: list[float]) -> None:
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert score(values).stderr == pytest.approx(expected, abs=1e-12)


def test_one_item_has_no_standard_error() -> None:
    assert math.isnan(score([1.0]).stderr)


@given(PAIRS)
def test_mcnemar_counts_the_ways_to_give_out_discordant_items(
    pairs: list[tuple[bool, bool]],
) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    assert mcnemar(first, second) == pytest.approx(float(reference.mcnemar(first, second)))
    assert mcnemar(first, second) == mcnemar(second, first)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (0, 5, 2 / 32), (1, 9, 2 * 11 / 1024), (6, 6, 1.0)],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p: float) -> None:
    first = [True] * only_first + [False] * only_second + [True, False] * 50
    second = [False] * only_first + [True] * only_second + [True, False] * 50
    assert mcnemar(first, second) == pytest.approx(p)


@pytest.mark.parametrize(("b", "c"), [(3, 12), (80, 121), (6900, 7100), (0, 1500)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    found = mcnemar([True] * b + [False] * c, [False] * b + [True] * c)
    assert found == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-9)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("0 0 1 1 0", "1 1 1 0 1"),
        ("0 1/4 1/2 1 3/4", "1/2 1/4 3/4 1 1"),
        ("1 1 0 0 1/2", "0 1 1/3 1 0"),
        ("1/2 0 1", "1/2 0 1"),
    ],
)
def test_the_bootstrap_is_that_of_all_resamples(first: str, second: str) -> None:
    a, b = ([Fraction(text) for text in line.split()] for line in (first, second))
    means = reference.resampled_means(a, b)
    found = paired_bootstrap([float(x) for x in a], [float(x) for x in b], resamples=40_000)
    assert found.mean == pytest.approx(float(sum(b) - sum(a)) / len(a))
    assert found.p == pytest.approx(float(reference.bootstrap_p(means)), abs=0.01)
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        # Within the exact percentiles a hair to either side: few items have few distinct means.
        around = [means[int((share + hair) * (len(means) - 1))] for hair in (-0.004, 0.004)]
        assert float(around[0]) - 1e-9 <= end <= float(around[1]) + 1e-9


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_the_bootstrap_is_deterministic_and_its_p_is_its_interval_inverted(
    pairs: list[tuple[float, float]],
) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = paired_bootstrap(first, second, resamples=500)
    assert found == paired_bootstrap(first, second, resamples=500)
    assert found.low <= found.high and 0 < found.p <= 1
    if found.low > 0 or found.high < 0:
        assert found.p < 0.06
    elif found.low < 0 < found.high:
        assert found.p > 0.04


def test_the_bootstrap_of_equal_candidates_finds_nothing() -> None:
    found = paired_bootstrap([0.1, 0.2, 0.7], [0.1, 0.2, 0.7])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="pairs are needed"):
        paired_bootstrap([], [])


def test_false_alarms_and_intervals_are_as_promised() -> None:
    """500 pairs of equally good candidates on 150 items: 5% false alarms, 95% coverage."""
    draw = random.Random(0)
    alarms = {"accuracy": 0, "pass@1": 0}
    for _ in range(500):
        hard = [draw.random() for _ in range(150)]
        first, second = (
            {str(i): float(draw.random() < x) for i, x in enumerate(hard)} for _ in "ab"
        )
        for metric in alarms:
            found = compare(first, second, metric=metric)
            alarms[metric] += found.p < 0.05
    assert 0 < alarms["accuracy"] <= 35  # the exact test keeps below its level
    assert 10 <= alarms["pass@1"] <= 42


def test_compare_picks_the_test_and_pairs_by_id() -> None:
    first = {f"item/{i}": float(i < 10) for i in range(20)}
    second = {f"item/{i}": float(i < 16) for i in reversed(range(20))}
    found = compare(first, second, metric="accuracy")
    assert (found.n, found.test, found.p) == (20, "McNemar", pytest.approx(2 / 64))
    assert found.difference == pytest.approx(0.3) and 0 < found.low < 0.3 < found.high < 0.6
    other = compare(first, second, metric="pass@1")
    assert other.test == "paired bootstrap" and other.p < 0.01
    assert (other.low, other.high) == (found.low, found.high)
    assert compare({"a": 0.5}, {"a": 1.0}, metric="accuracy").test == "paired bootstrap"


def test_compare_refuses_other_items() -> None:
    items = {"a": 1.0, "b": 0.0, "c": 0.0}
    with pytest.raises(UserError, match=r"only the first candidate was asked 'b' \(2 such items"):
        compare(items, {"a": 1.0}, metric="accuracy")
    with pytest.raises(UserError, match="only the second candidate was asked 'b'"):
        compare({"a": 1.0}, items, metric="accuracy")
    with pytest.raises(UserError, match="no items to compare"):
        compare({}, {}, metric="accuracy")
