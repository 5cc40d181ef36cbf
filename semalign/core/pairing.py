"""Which teacher layer supervises which student layer (section 4.1).

The paper counts layers from 1, code counts from 0. Strategies and the formulas below count from 1;
`pair_layers` takes and returns 0-based layers. The two are converted in this file alone: messages
and tables show `paper_number(layer)`.
"""

from __future__ import annotations

import math
import random as random_module
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from semalign.errors import UserError
from semalign.registry import Registry


@dataclass(frozen=True)
class Pair:
    """A student layer and the teacher layers that supervise it, 0-based.

    The target is the sum of the teacher layers' outputs times `weights` (which sum to 1): one
    layer of weight 1, or two when interpolated. `str(pair)` counts from 1.
    """

    teacher: tuple[int, ...]
    weights: tuple[float, ...]
    student: int

    def __str__(self) -> str:
        teacher = " + ".join(
            f"{'' if weight == 1 else f'{weight:.3g} x '}{paper_number(layer)}"
            for layer, weight in zip(self.teacher, self.weights, strict=True)
        )
        return f"teacher {teacher} -> student {paper_number(self.student)} (counted from 1)"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The inputs of a pairing strategy. All layers are 1-based, as in the paper.

    `critical`: teacher layers, most critical first. `explicit`: the user's (teacher, student).
    `similarity`: a row a teacher layer, a column a student layer; None if it was not measured.
    """

    num_teacher_layers: int
    num_student_layers: int
    critical: tuple[int, ...]
    seed: int
    explicit: tuple[tuple[int, int], ...]
    similarity: tuple[tuple[float, ...], ...] | None = None


# A pair in the paper's numbering: {teacher layer: weight}, student layer.
PaperPair = tuple[dict[int, float], int]
PairFunction = Callable[[Request], list[PaperPair]]


@dataclass(frozen=True)
class Strategy:
    """A way to pair layers, and what it depends on: `critical` (the attributed layers), their
    `count` alone, the layers' `similarity`, the `explicit` pairs, the `seed`.
    """

    pair: PairFunction
    looks_at: frozenset[str]

    @property
    def description(self) -> str:
        return (self.pair.__doc__ or "").partition("\n")[0]


STRATEGIES: Registry[Strategy] = Registry("pairing strategy")


def register_pairing(
    name: str, pair: PairFunction, *, looks_at: Iterable[str] = ("critical",)
) -> None:
    """Add a pairing strategy.

    **Arguments**: `pair` takes a `Request` and returns pairs in the paper's numbering; `looks_at`
    names what of the request it reads (see `Strategy`): no more is computed for it.
    """
    STRATEGIES.register(name, Strategy(pair, frozenset(looks_at)))


def _strategy(*looks_at: str) -> Callable[[PairFunction], PairFunction]:
    """Register a strategy under its function's name."""

    def register(function: PairFunction) -> PairFunction:
        register_pairing(function.__name__, function, looks_at=looks_at)
        return function

    return register


def paper_number(layer: int) -> int:
    """0-based layer -> the paper's 1-based number."""
    return layer + 1


def code_index(number: int) -> int:
    """The paper's 1-based layer number -> 0-based layer."""
    return number - 1


def teacher_counterpart(k: int, num_teacher_layers: int, num_student_layers: int) -> int:
    """l_k^T = max(1, floor(L_T / L_S * k)): student layer k's teacher layer, both 1-based."""
    return max(1, num_teacher_layers * k // num_student_layers)


def k_dagger(critical: int, num_teacher_layers: int, num_student_layers: int) -> int:
    """k-dagger = min{k : l_k^T >= l*}, the nearest deeper-or-equal student layer, both 1-based.

    For l* > 1, floor(L_T / L_S * k) >= l* exactly when k >= l* L_S / L_T, so k-dagger is that bound
    rounded up; l* = 1 is met by k = 1. l_{L_S}^T = L_T, so the set is never empty.
    """
    if critical <= 1:
        return 1
    return min(-(-critical * num_student_layers // num_teacher_layers), num_student_layers)


def all_pairs(num_teacher_layers: int, num_student_layers: int) -> list[tuple[int, int]]:
    """Every (teacher, student) pair, both 1-based, for a search through all of them.

    Each is a transfer of its own (an `explicit` pair): one transfer trains a student layer towards
    one target, so there is no strategy of that name.
    """
    teachers, students = range(1, num_teacher_layers + 1), range(1, num_student_layers + 1)
    return [(teacher, student) for teacher in teachers for student in students]


def interpolation(
    k: int, num_teacher_layers: int, num_student_layers: int
) -> tuple[int, int, float]:
    """(a, b, lambda): adjacent teacher layers around student depth k, and the share of b; 1-based.

    u = L_T k / L_S, a = max(1, min(floor(u), L_T - 1)), b = a + 1, lambda = clip(u - a, 0, 1).
    u is kept as a fraction: no rounding can move its floor.
    """
    u = Fraction(num_teacher_layers * k, num_student_layers)
    a = max(1, min(u.__floor__(), num_teacher_layers - 1))
    return a, a + 1, float(min(max(u - a, Fraction(0)), Fraction(1)))


@_strategy("critical")
def proportional(request: Request) -> list[PaperPair]:
    """(l_{k-dagger}^T, k-dagger): the teacher layer at the student layer's own depth."""
    sizes = request.num_teacher_layers, request.num_student_layers
    students = [k_dagger(layer, *sizes) for layer in request.critical]
    return [({teacher_counterpart(k, *sizes): 1.0}, k) for k in students]


@_strategy("critical")
def attributed(request: Request) -> list[PaperPair]:
    """(l*, k-dagger): the critical teacher layer itself."""
    sizes = request.num_teacher_layers, request.num_student_layers
    return [({layer: 1.0}, k_dagger(layer, *sizes)) for layer in request.critical]


@_strategy("critical")
def interpolated(request: Request) -> list[PaperPair]:
    """((1 - lambda) a + lambda b, k-dagger): the two teacher layers around k-dagger's depth."""
    sizes = request.num_teacher_layers, request.num_student_layers
    pairs: list[PaperPair] = []
    for layer in request.critical:
        k = k_dagger(layer, *sizes)
        a, b, share = interpolation(k, *sizes)
        pairs.append(({a: 1 - share, b: share}, k))
    return pairs


@_strategy("critical", "similarity")
def cka(request: Request) -> list[PaperPair]:
    """(l*, the student layer of highest linear CKA with l*); of several the shallowest."""
    if request.similarity is None:
        raise UserError(
            "pairing strategy 'cka' needs the similarity of every teacher and student layer"
        )
    pairs: list[PaperPair] = []
    for layer in request.critical:
        row = request.similarity[code_index(layer)]
        pairs.append(({layer: 1.0}, paper_number(row.index(max(row)))))
    return pairs


@_strategy("explicit")
def explicit(request: Request) -> list[PaperPair]:
    """The user's own (teacher, student) pairs, counted from 1."""
    if not request.explicit:
        raise UserError("pairing strategy 'explicit' needs a list of (teacher, student) layers")
    return [({teacher: 1.0}, student) for teacher, student in request.explicit]


@_strategy("critical")
def reverse(request: Request) -> list[PaperPair]:
    """Negative control: (l*, L_S + 1 - k-dagger), the wrong end of the student.

    The middle one of an odd number of layers is its own mirror image: no control there.
    """
    sizes = request.num_teacher_layers, request.num_student_layers
    top = request.num_student_layers + 1
    return [({layer: 1.0}, top - k_dagger(layer, *sizes)) for layer in request.critical]


@_strategy()
def last(request: Request) -> list[PaperPair]:
    """Control: last teacher layer with last student layer, regardless of attribution."""
    return [({request.num_teacher_layers: 1.0}, request.num_student_layers)]


@_strategy("count", "seed")
def random(request: Request) -> list[PaperPair]:
    """Control: as many pairs of distinct layers as there are critical ones, drawn from the seed."""
    sizes = request.num_teacher_layers, request.num_student_layers
    count = min(len(request.critical), *sizes)
    draw = random_module.Random(request.seed)
    teachers, students = (draw.sample(range(1, size + 1), count) for size in sizes)
    return [({teacher: 1.0}, k) for teacher, k in zip(teachers, students, strict=True)]


def pair_layers(
    strategy: str,
    *,
    num_teacher_layers: int,
    num_student_layers: int,
    critical: list[int],
    seed: int = 0,
    explicit: list[tuple[int, int]] | None = None,
    similarity: Sequence[Sequence[float]] | None = None,
) -> list[Pair]:
    """The pairs of a transfer, 0-based; each student layer at most once (its most critical pair).

    **Arguments**: `critical` teacher layers, 0-based, most critical first (`critical_layers`);
    `explicit` pairs as configured, counted from 1; `similarity`, needed by `cka` alone: a row a
    teacher layer, a column a student layer (`MinibatchCKA.matrix`).

    **Raises** `UserError` for an unknown strategy, a layer out of range, and a similarity that is
    missing, not finite or of another shape.
    """
    chosen = STRATEGIES.find(strategy, "pairing.strategy")
    request = Request(
        num_teacher_layers=num_teacher_layers,
        num_student_layers=num_student_layers,
        critical=tuple(paper_number(layer) for layer in critical),
        seed=seed,
        explicit=tuple(explicit or ()),
        similarity=_checked(similarity, num_teacher_layers, num_student_layers),
    )
    pairs: dict[int, Pair] = {}
    for weights, student in chosen.pair(request):
        # A teacher layer of weight 0 need not be extracted (and b may lie beyond the last layer).
        mixture = {layer: weight for layer, weight in weights.items() if weight > 0}
        for layer in mixture:
            _check_range("teacher", layer, num_teacher_layers)
        _check_range("student", student, num_student_layers)
        teacher = tuple(code_index(layer) for layer in mixture)
        pair = Pair(teacher, tuple(mixture.values()), code_index(student))
        pairs.setdefault(pair.student, pair)
    return list(pairs.values())


def _checked(
    similarity: Sequence[Sequence[float]] | None, rows: int, columns: int
) -> tuple[tuple[float, ...], ...] | None:
    if similarity is None:
        return None
    matrix = tuple(tuple(float(value) for value in row) for row in similarity)
    found = len(matrix), *{len(row) for row in matrix}
    if found != (rows, columns):
        raise UserError(
            f"similarity has shape {found}; expected ({rows}, {columns}), teacher by student layers"
        )
    if not all(math.isfinite(value) for row in matrix for value in row):
        raise UserError("similarity is not finite: try dtype float32 or bfloat16")
    return matrix


def _check_range(side: str, number: int, num_layers: int) -> None:
    if not 1 <= number <= num_layers:
        raise UserError(
            f"{side} layer {number} is out of range: the {side} has layers 1..{num_layers}"
        )
