"""Comparisons of recorded outputs: the right test, the same profile, and a line to read."""

from __future__ import annotations

import pytest

from semalign.core.statistics import Comparison
from semalign.errors import UserError
from semalign.report.compare import by_group, line, paired
from tests.recorded import records


def test_accuracy_is_compared_by_mcnemar_and_pass_at_k_by_bootstrap() -> None:
    first, second = "-" * 9 + "+" * 11, "+" * 8 + "-" + "+" * 10 + "-"
    found = paired(records(first), records(second))
    assert (found.n, found.test, found.p) == (20, "McNemar", pytest.approx(2 * 10 / 2**9))
    assert found.difference == pytest.approx(7 / 20)
    assert paired(records(first, "gsm8k"), records(second, "gsm8k")).test == "McNemar"
    other = paired(records(first, "mbpp"), records(second, "mbpp"))
    assert other.test == "paired bootstrap" and other.difference == found.difference


def test_several_samples_are_one_item() -> None:
    first = records("+-" * 10, "humaneval", samples=2)
    second = records("++" * 10, "humaneval", samples=2)
    assert paired(first, second).difference == 0.5
    assert paired(first, second).n == 10
    assert paired(first, second, k=2).difference == 0


def test_the_order_of_records_does_not_matter() -> None:
    first, second = records("+-+-+"), records("--+++")
    assert paired(first, second) == paired(first, second[::-1])


def test_other_profiles_tasks_and_items_are_refused() -> None:
    with pytest.raises(UserError, match=r"profile paper-1@3f2a9c and of profile plain-1@77"):
        paired(records("+-"), records("+-", profile="plain-1@77"))
    with pytest.raises(UserError, match=r"found gsm8k test, mmlu test"):
        paired(records("+-"), records("+-", "gsm8k"))
    with pytest.raises(UserError, match="only the first candidate was asked 'mmlu/2'"):
        paired(records("+-+"), records("+-"))
    with pytest.raises(UserError, match="found no record"):
        paired([], records("+-"))
    with pytest.raises(UserError, match="one profile, found paper-1@3f2a9c, plain-1@77"):
        paired(records("+") + records("-", profile="plain-1@77"), records("+-"))


def test_groups_are_scored_by_name() -> None:
    found = by_group(records("+-++-"))
    assert list(found) == ["logic", "sums"]
    assert (found["logic"].n, found["logic"].value) == (2, 0.5)
    assert (found["sums"].n, found["sums"].value) == (3, pytest.approx(2 / 3))
    assert by_group(records("+-", "gsm8k")) == {}


def test_lines() -> None:
    found = Comparison(n=400, difference=0.013, low=-0.004, high=0.03, p=0.1234, test="McNemar")
    assert line("student", "transferred", found) == (
        "student -> transferred: +1.3 points (95% -0.4 to 3.0), McNemar p = 0.12, n = 400"
    )
    sure = Comparison(
        n=164, difference=-0.2, low=-0.31, high=-0.09, p=2e-4, test="paired bootstrap"
    )
    assert line("teacher", "student", sure) == (
        "teacher -> student: -20.0 points (95% -31.0 to -9.0), paired bootstrap p < 0.001, n = 164"
    )


def test_nothing_has_no_sign() -> None:
    even = Comparison(n=3, difference=-1e-9, low=-1e-9, high=1e-9, p=1.0, test="McNemar")
    assert line("a", "b", even) == "a -> b: +0.0 points (95% 0.0 to 0.0), McNemar p = 1, n = 3"
