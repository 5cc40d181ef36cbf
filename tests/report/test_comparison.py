"""Methods side by side, from hand-made scores: gaps to the teacher, differences to the control."""

from __future__ import annotations

from pathlib import Path

import pytest

from semalign.core.statistics import Score
from semalign.report import comparison
from semalign.report.comparison import Tables
from semalign.sweep.file import load_sweep
from semalign.sweep.summary import Result, Summary, summarise
from semalign.sweep.trials import Trial, trials

SWEEP = """
base: {method: sft, evaluation: {tasks: [mmlu, gsm8k], splits: [test]}}
axes:
  teacher: [zoo/teacher, zoo/code-teacher]
  data.task: [mmlu, gsm8k]
  method: [sft, semalign]
seeds: [0, 1]
compare: {axis: method, control: sft}
"""
COST = {"trained_parameters": 10.0, "seconds": 2.0, "peak_bytes": 1e9}


def result(trial: Trial) -> Result:
    """Of 10 items semalign has 6 right, or 8 with the second seed; the control has 5."""
    right = 5 if trial.config.method == "sft" else 6 + 2 * trial.seed
    items = {str(item): float(item < right) for item in range(10)}
    return Result(
        trial=trial, items={(trial.config.data.task, "test"): items}, seconds=3.0, cost=COST
    )


def reference(value: float) -> dict[tuple[str, str], Score]:
    found = Score(n=10, value=value, stderr=0.1, low=value - 0.1, high=value + 0.1)
    return {("mmlu", "test"): found, ("gsm8k", "test"): found}


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    file = tmp_path / "methods.yaml"
    file.write_text(SWEEP)
    sweep = load_sweep(file)
    models = {"zoo/student": 0.4, "zoo/teacher": 0.9, "zoo/code-teacher": 0.8}
    return summarise(
        sweep,
        [result(trial) for trial in trials(sweep)],
        {name: reference(value) for name, value in models.items()},
    )


def test_nothing_is_chosen(summary: Summary) -> None:
    assert summary.chosen is None
    assert {setting.metric for setting in summary.settings} == {("mmlu", "test"), ("gsm8k", "test")}


def test_scores_and_gaps_to_the_rows_own_teacher(summary: Summary) -> None:
    head, body = Tables(summary).scores()
    assert head == ["test", "mmlu", "gsm8k", "mean gap"]
    assert [(row[0], row[-1]) for row in body] == [
        ("student zoo/student", "50.00"),
        ("teacher zoo/teacher", ""),
        ("sft", "40.00"),
        ("semalign", "20.00"),
        ("student zoo/student", "40.00"),
        ("teacher zoo/code-teacher", ""),
        ("sft", "30.00"),
        ("semalign", "10.00"),
    ]
    assert body[3][1] == "70.0 ± 14.1 (gap 20.0)"


def test_differences_are_to_the_control_under_the_same_teacher(summary: Summary) -> None:
    _, body = Tables(summary).differences()
    assert [row[0] for row in body] == ["semalign (zoo/teacher)", "semalign (zoo/code-teacher)"]
    assert all(cell.startswith("+20.0 (") and ", p " in cell for row in body for cell in row[1:])


def test_costs_and_the_whole_report(summary: Summary) -> None:
    _, body = Tables(summary).costs()
    assert body[0] == ["sft (zoo/teacher)", "10", "2.0", "1.00"]
    text = comparison.comparison_markdown(summary)
    assert text.index("## On test") < text.index("## Against the control") < text.index("## Costs")
