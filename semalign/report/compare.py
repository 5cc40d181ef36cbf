"""Two candidates compared on the same items, from their records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from semalign.artifacts.records import Record, item_scores
from semalign.core.statistics import Comparison, Score, compare, score
from semalign.errors import UserError
from semalign.tasks import find_task


def paired(first: Sequence[Record], second: Sequence[Record], *, k: int = 1) -> Comparison:
    """Second minus first on one task and split: accuracy by McNemar's test, pass@k by bootstrap.

    Raises UserError when the two were made under different profiles, are not of one task and
    split, or do not hold the same items.
    """
    left, right = _profile(first), _profile(second)
    if left != right:
        raise UserError(
            f"scores of profile {left} and of profile {right} cannot be compared; "
            "evaluate both candidates under the same one"
        )
    kinds = sorted({f"{record.task} {record.split}" for record in (*first, *second)})
    if len(kinds) != 1:
        raise UserError(f"records of one task and split compare, found {', '.join(kinds)}")
    metric = find_task(first[0].task).metric
    return compare(item_scores(first, k=k), item_scores(second, k=k), metric=metric)


def _profile(records: Sequence[Record]) -> str:
    found = sorted({record.profile for record in records})
    if len(found) != 1:
        raise UserError(f"expected records of one profile, found {', '.join(found) or 'no record'}")
    return found[0]


def by_group(records: Iterable[Record], *, k: int = 1) -> dict[str, Score]:
    """The score of every group, such as MMLU's subjects, by name, without records of no group."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.group is not None:
            groups.setdefault(record.group, []).append(record)
    return {
        name: score(list(item_scores(rows, k=k).values())) for name, rows in sorted(groups.items())
    }


def own_metrics(task: str, records: Iterable[Record]) -> dict[str, float]:
    """The metrics that a task of lm_eval computes by itself, over all items; of others none."""
    found = [record.metrics for record in records if record.metrics is not None]
    return find_task(task).totals(found) if found else {}


def line(first: str, second: str, comparison: Comparison) -> str:
    """`student -> transferred: +1.3 points (95% -0.4 to 3.0), McNemar p = 0.12, n = 400`."""
    low, high = 100 * comparison.low, 100 * comparison.high
    p = "p < 0.001" if comparison.p < 0.001 else f"p = {comparison.p:.2g}"
    return (
        f"{first} -> {second}: {100 * comparison.difference:+z.1f} points "
        f"(95% {low:z.1f} to {high:z.1f}), {comparison.test} {p}, n = {comparison.n}"
    )
