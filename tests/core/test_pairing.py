from __future__ import annotations

import pytest

from semalign.core import pairing
from semalign.core.pairing import STRATEGIES, Pair, pair_layers
from semalign.errors import UserError
from tests.reference import pairing as reference

SIZES = range(1, 49)
LLAMA_2 = {"num_teacher_layers": 40, "num_student_layers": 32}  # 13B -> 7B


def test_formulas_equal_brute_force_for_all_sizes() -> None:
    for teacher in SIZES:
        for student in SIZES:
            for k in range(1, student + 1):
                found = pairing.teacher_counterpart(k, teacher, student)
                assert found == reference.teacher_counterpart(k, teacher, student)
                a, b, share = reference.interpolation(k, teacher, student)
                assert pairing.interpolation(k, teacher, student) == (a, b, float(share))


def test_k_dagger_equals_brute_force_for_all_sizes() -> None:
    for teacher in SIZES:
        for student in SIZES:
            for critical in range(1, teacher + 1):
                found = pairing.k_dagger(critical, teacher, student)
                assert found == reference.k_dagger(critical, teacher, student)


def test_the_papers_example() -> None:
    assert [pairing.teacher_counterpart(k, 20, 10) for k in range(1, 11)] == list(range(2, 21, 2))
    # Figure 3: the 20th teacher layer's pair is the 10th student layer
    pairs = pair_layers("attributed", num_teacher_layers=20, num_student_layers=10, critical=[19])
    assert pairs == [Pair((19,), (1.0,), 9)]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        # 1-based: l* = 4 lies between l_3 = 3 and l_4 = 5, so k-dagger = 4
        ("proportional", Pair((4,), (1.0,), 3)),
        ("attributed", Pair((3,), (1.0,), 3)),
        ("interpolated", Pair((4,), (1.0,), 3)),  # u = 40 * 4 / 32 = 5 exactly: lambda = 0
        ("last", Pair((39,), (1.0,), 31)),
    ],
)
def test_strategies_by_hand(strategy: str, expected: Pair) -> None:
    assert pair_layers(strategy, **LLAMA_2, critical=[3]) == [expected]


def test_interpolation_by_hand() -> None:
    # 1-based: l* = 6 = l_5, k-dagger = 5, u = 6.25: 0.75 of layer 6 and 0.25 of layer 7
    (pair,) = pair_layers("interpolated", **LLAMA_2, critical=[5])
    assert pair == Pair((5, 6), (0.75, 0.25), 4)
    assert str(pair) == "teacher 0.75 x 6 + 0.25 x 7 -> student 5 (counted from 1)"
    # at the very top a = L_T - 1 and lambda = 1: layer b alone
    assert pair_layers("interpolated", **LLAMA_2, critical=[39]) == [Pair((39,), (1.0,), 31)]


def test_every_strategy_gives_valid_pairs_for_all_sizes() -> None:
    for name in STRATEGIES:
        for teacher in (1, 2, 3, 7, 12, 48):
            for student in (1, 2, 5, 12, 48):
                pairs = pair_layers(
                    name,
                    num_teacher_layers=teacher,
                    num_student_layers=student,
                    critical=list(range(teacher)),
                    seed=3,
                    explicit=[(1, 1)],
                )
                students = [pair.student for pair in pairs]
                assert pairs and len(set(students)) == len(students)
                for pair in pairs:
                    assert 0 <= pair.student < student
                    assert all(0 <= layer < teacher for layer in pair.teacher)
                    assert sum(pair.weights) == pytest.approx(1)


def test_a_student_layer_keeps_its_most_critical_pair() -> None:
    # 4 -> 2 layers: teacher layers 3 and 4 (1-based) share student layer 2
    sizes = {"num_teacher_layers": 4, "num_student_layers": 2}
    pairs = pair_layers("attributed", **sizes, critical=[2, 3, 0])
    assert pairs == [Pair((2,), (1.0,), 1), Pair((0,), (1.0,), 0)]


def test_explicit_pairs_count_from_one() -> None:
    pairs = pair_layers("explicit", **LLAMA_2, critical=[], explicit=[(40, 32), (1, 1)])
    assert pairs == [Pair((39,), (1.0,), 31), Pair((0,), (1.0,), 0)]


def test_random_pairs_depend_on_the_seed_alone() -> None:
    draws = {
        seed: pair_layers("random", **LLAMA_2, critical=[1, 2, 3], seed=seed) for seed in range(5)
    }
    assert all(len(pairs) == 3 for pairs in draws.values())
    assert draws[0] == pair_layers("random", **LLAMA_2, critical=[7, 8, 9], seed=0)
    assert len({tuple(pairs) for pairs in draws.values()}) == 5


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((41, 1), "teacher layer 41 is out of range: the teacher has layers 1..40"),
        ((0, 1), "teacher layer 0 is out of range"),
        ((1, 33), "student layer 33 is out of range: the student has layers 1..32"),
    ],
)
def test_layers_out_of_range_are_refused(pair: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pair_layers("explicit", **LLAMA_2, critical=[], explicit=[pair])


def test_unknown_strategy_and_missing_pairs_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'interpolated'"):
        pair_layers("interpolate", **LLAMA_2, critical=[0])
    with pytest.raises(UserError, match="needs a list"):
        pair_layers("explicit", **LLAMA_2, critical=[0])


def test_adding_a_strategy_is_adding_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "STRATEGIES", dict(STRATEGIES))

    @pairing.strategy
    def first(_request: pairing.Request) -> list[pairing.PaperPair]:
        return [({1: 1.0}, 1)]

    assert pair_layers("first", **LLAMA_2, critical=[9]) == [Pair((0,), (1.0,), 0)]


def test_the_numberings_are_inverse() -> None:
    assert pairing.paper_number(0) == 1
    assert [pairing.code_index(pairing.paper_number(layer)) for layer in SIZES] == list(SIZES)
