"""Optuna's suggestions: in the space, the same again, better than chance on an easy score."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from semalign.methods.method import method_of
from semalign.sweep.file import Sweep, load_sweep
from semalign.sweep.search import ROUND, Point, suggest
from semalign.sweep.trials import Trial, count, extremes, make_trial, trials

pytest.importorskip("optuna", reason="the extra `search` is not installed")

SWEEP = """
axes:
  loss.alpha: {uniform: [0, 1]}
  training.lr: {loguniform: [1.0e-4, 1.0e-2]}
  training.lora.rank: {randint: [2, 8]}
  extraction.interface: [mlp, attn]
samples: 30
search: optuna
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    file = tmp_path / "search.yaml"
    file.write_text(SWEEP)
    return load_sweep(file)


def rank(trial: Trial) -> int | None:
    return method_of(trial.config).rank(trial.config)


def score(point: Point) -> float:
    """Best at alpha = 0.8 with the attention."""
    bonus = 0.2 if point["extraction.interface"].value == "attn" else 0.0
    return 1 - abs(float(point["loss.alpha"].value) - 0.8) + bonus


def search(sweep: Sweep) -> list[tuple[Point, float | None]]:
    scored: list[tuple[Point, float | None]] = []
    while points := suggest(sweep, scored):
        scored += [(point, score(point)) for point in points]
    return scored


def test_suggestions_are_in_the_space_and_as_many_as_asked(sweep: Sweep) -> None:
    found = search(sweep)
    assert len(found) == 30 and count(sweep) == 30
    for point, _ in found:
        trial = make_trial(sweep, point, 0)
        assert 0 <= trial.config.loss.alpha <= 1
        assert 1e-4 <= trial.config.training.lr <= 1e-2
        assert 2 <= trial.config.training.lora.rank <= 8


def test_the_same_scores_give_the_same_suggestions(sweep: Sweep) -> None:
    first, second = search(sweep), search(sweep)
    assert [make_trial(sweep, p, 0).id for p, _ in first] == [
        make_trial(sweep, p, 0).id for p, _ in second
    ]


def test_later_suggestions_score_better_than_the_first(sweep: Sweep) -> None:
    found = [value for _, value in search(sweep) if value is not None]
    assert statistics.fmean(found[-10:]) > statistics.fmean(found[:10]) + 0.1


def test_a_point_without_a_score_is_passed_over(sweep: Sweep) -> None:
    points = suggest(sweep, [])
    again = suggest(sweep, [(points[0], None), *((p, score(p)) for p in points[1:])])
    assert len(points) == len(again) == ROUND


def test_extremes_bound_what_may_be_asked_for(sweep: Sweep) -> None:
    ranks = [rank(trial) for trial in extremes(sweep)]
    assert max(rank or 0 for rank in ranks) == 16  # the base's own
    assert {trial.config.extraction.interface for trial in extremes(sweep)} == {"mlp", "attn"}


def test_extremes_join_what_different_axes_set(tmp_path: Path) -> None:
    """Every case with each end of the rank; with alpha alone beta may be 0."""
    file = tmp_path / "search.yaml"
    file.write_text(
        "axes:\n  kind: {cases: {lora: {loss.alpha: 0.3}, sft: {method: sft}}}\n"
        "  training.lora.rank: {randint: [2, 64]}\n  loss.beta: {uniform: [0, 1]}\n"
        "samples: 3\nsearch: optuna\n"
    )
    found = extremes(load_sweep(file))
    assert {rank(trial) for trial in found} == {16, 2, 33, 64}
    ends = {(trial.config.method, rank(trial)) for trial in found}
    assert {(method, end) for method in ("semalign", "sft") for end in (2, 64)} < ends
    assert {trial.config.loss.beta for trial in found} == {1.0, 0.5, 0.0}


def test_random_points_stand_for_the_suggestions_in_a_plan(sweep: Sweep) -> None:
    assert len(trials(sweep)) == 31  # with the base
