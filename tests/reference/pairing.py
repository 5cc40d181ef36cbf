"""Section 4.1's layer pairing by brute force: search instead of formulas, everything 1-based."""

from __future__ import annotations

from fractions import Fraction
from functools import cache


def floor(x: Fraction) -> int:
    """Largest integer n with n <= x, by counting up (x >= 0)."""
    n = 0
    while n + 1 <= x:
        n += 1
    return n


@cache
def teacher_counterpart(k: int, teacher_layers: int, student_layers: int) -> int:
    n = floor(Fraction(teacher_layers, student_layers) * k)
    return n if n > 1 else 1


def k_dagger(critical: int, teacher_layers: int, student_layers: int) -> int:
    candidates = [
        k
        for k in range(1, student_layers + 1)
        if teacher_counterpart(k, teacher_layers, student_layers) >= critical
    ]
    return min(candidates) if candidates else student_layers


def interpolation(k: int, teacher_layers: int, student_layers: int) -> tuple[int, int, Fraction]:
    rho = Fraction(k, student_layers)
    u = teacher_layers * rho
    a = max(1, min(floor(u), teacher_layers - 1))
    b = a + 1
    share = u - a
    if share < 0:
        share = Fraction(0)
    if share > 1:
        share = Fraction(1)
    return a, b, share


def most_similar(row: list[float]) -> int:
    """The student layer that no other is more similar than, nor a shallower one as similar."""
    for k in range(1, len(row) + 1):
        if all(row[k - 1] >= other for other in row) and row[k - 1] not in row[: k - 1]:
            return k
    raise AssertionError("no maximum")


def mirror(k: int, student_layers: int) -> int:
    """Walk from both ends until one of the walkers is at k: the other is at its mirror image."""
    for low, high in zip(range(1, student_layers + 1), range(student_layers, 0, -1), strict=True):
        if low == k:
            return high
    raise AssertionError("k is out of range")
