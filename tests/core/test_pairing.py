from __future__ import annotations

import math
import random

import pytest

from semalign.core import pairing
from semalign.core.pairing import STRATEGIES, Pair, PaperPair, Request, pair_layers
from semalign.errors import UserError
from semalign.registry import Registry
from tests.reference import pairing as reference

SIZES = range(1, 49)
LLAMA_2 = {"num_teacher_layers": 40, "num_student_layers": 32}  # 13B -> 7B


def similarity(teacher: int, student: int, *, seed: int = 0) -> list[list[float]]:
    """Few different values, so that there are ties; negative ones too, as unbiased CKA can be."""
    draw = random.Random(seed)
    return [[draw.randint(-3, 10) / 10 for _ in range(student)] for _ in range(teacher)]


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
                    similarity=similarity(teacher, student),
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


def all_critical(name: str, teacher: int, student: int, **more: object) -> list[PaperPair]:
    """The pairs of a strategy for every teacher layer as the critical one, in order, 1-based."""
    critical = tuple(range(1, teacher + 1))
    return STRATEGIES[name].pair(
        Request(
            num_teacher_layers=teacher, num_student_layers=student,
            critical=critical, seed=0, explicit=(), **more,
        )
    )  # fmt: skip


def test_cka_equals_brute_force_for_all_sizes() -> None:
    for teacher in SIZES:
        for student in SIZES:
            measured = tuple(map(tuple, similarity(teacher, student, seed=teacher)))
            expected = [
                ({layer: 1.0}, reference.most_similar(list(row)))
                for layer, row in enumerate(measured, start=1)
            ]
            assert all_critical("cka", teacher, student, similarity=measured) == expected


def test_cka_by_hand() -> None:
    measured = [[0.1, 0.9], [0.8, 0.3], [0.5, 0.5], [-0.2, -0.1]]
    sizes = {"num_teacher_layers": 4, "num_student_layers": 2}
    for critical, student in enumerate([1, 0, 0, 1]):
        pairs = pair_layers("cka", **sizes, critical=[critical], similarity=measured)
        assert pairs == [Pair((critical,), (1.0,), student)]
    # teacher layers 1 and 4 (1-based) are both most like student layer 2: the critical one has it
    pairs = pair_layers("cka", **sizes, critical=[3, 1, 0], similarity=measured)
    assert pairs == [Pair((3,), (1.0,), 1), Pair((1,), (1.0,), 0)]


def test_reverse_is_the_mirror_image_of_attributed_for_all_sizes() -> None:
    for teacher in SIZES:
        for student in SIZES:
            expected = [
                (target, reference.mirror(k, student))
                for target, k in all_critical("attributed", teacher, student)
            ]
            assert all_critical("reverse", teacher, student) == expected


def test_reverse_by_hand() -> None:
    # 13B -> 7B: l* = 40 belongs to student layer 32 and is given to layer 1; 4 -> 4 becomes 29
    assert pair_layers("reverse", **LLAMA_2, critical=[39, 3]) == [
        Pair((39,), (1.0,), 0),
        Pair((3,), (1.0,), 28),
    ]


def test_all_pairs_are_each_pair_once() -> None:
    assert pairing.all_pairs(2, 3) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    pairs = pairing.all_pairs(48, 32)
    assert len(set(pairs)) == len(pairs) == 48 * 32
    for pair in pairs:  # each is in range, as a transfer of its own
        sizes = {"num_teacher_layers": 48, "num_student_layers": 32}
        (found,) = pair_layers("explicit", **sizes, critical=[], explicit=[pair])
        assert (found.teacher[0] + 1, found.student + 1) == pair
    assert "all" not in STRATEGIES


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
    with pytest.raises(UserError, match="'cka' needs the similarity"):
        pair_layers("cka", **LLAMA_2, critical=[0])


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (similarity(32, 40), r"shape \(32, 40\); expected \(40, 32\)"),
        ([[0.5] * 32] * 39 + [[0.5] * 31], r"expected \(40, 32\)"),
        ([[math.nan] * 32] * 40, "similarity is not finite"),
    ],
)
def test_a_similarity_that_does_not_fit_is_refused(
    measured: list[list[float]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pair_layers("cka", **LLAMA_2, critical=[0], similarity=measured)


def test_adding_a_strategy_is_adding_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    strategies: Registry[pairing.Strategy] = Registry("pairing strategy")
    monkeypatch.setattr(pairing, "STRATEGIES", strategies)

    def first(_request: pairing.Request) -> list[pairing.PaperPair]:
        """The first of both."""
        return [({1: 1.0}, 1)]

    pairing.register_pairing("first", first)
    assert strategies["first"].description == "The first of both."
    assert pair_layers("first", **LLAMA_2, critical=[9]) == [Pair((0,), (1.0,), 0)]


def test_the_numberings_are_inverse() -> None:
    assert pairing.paper_number(0) == 1
    assert [pairing.code_index(pairing.paper_number(layer)) for layer in SIZES] == list(SIZES)
