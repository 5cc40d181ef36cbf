"""The report of a sweep: chosen on dev, shown on test, from hand-made scores."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from semalign.config.read import resolve
from semalign.core.statistics import compare, score
from semalign.report import sweep as report
from semalign.report import table
from semalign.report.figures import heat_map, parallel_coordinates
from semalign.sweep.file import Sweep, load_sweep
from semalign.sweep.summary import Result, Summary, finished, summarise, versus
from semalign.sweep.trials import Trial, trials
from tests.recorded import records

SWEEP = """
description: how much alignment
base: {loss.alpha: 0, evaluation: {tasks: [mmlu, gsm8k]}}
axes: {loss.alpha: [0, 0.1, 1], loss.beta: [1, 2]}
seeds: [0, 1]
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    file = tmp_path / "weights.yaml"
    file.write_text(SWEEP)
    return load_sweep(file)


def items(verdicts: str) -> dict[str, float]:
    """`++-`: two right and one wrong."""
    return {str(place): float(verdict == "+") for place, verdict in enumerate(verdicts)}


def result(trial: Trial, dev: int, test: int = 5) -> Result:
    """Right in the first `dev` of 10 items of dev, in the first `test` of test."""
    return Result(
        trial=trial,
        items={
            (task, split): items("+" * right + "-" * (10 - right))
            for task in ("mmlu", "gsm8k")
            for split, right in (("dev", dev), ("test", test))
        },
        seconds=12.5,
    )


DEV = {(0, 1): (5, 5), (0, 2): (4, 6), (0.1, 1): (6, 8), (0.1, 2): (9, 1), (1, 1): (3, 3)}


@pytest.fixture
def make(sweep: Sweep) -> Callable[[], Summary]:
    """Setting (1, 2) fails with its first seed and is stopped with its second."""

    def results() -> list[Result]:
        made = []
        for trial in trials(sweep):
            point = trial.axes["loss.alpha"], trial.axes["loss.beta"]
            if point in DEV:
                made.append(result(trial, DEV[point][trial.seed], 4 + trial.seed + int(point[0])))
            else:
                error = "Traceback ...\nRuntimeError: out of luck\n" if trial.seed == 0 else None
                made.append(Result(trial=trial, error=error, seconds=1.0))
        return made

    return lambda: summarise(sweep, results())


def test_the_best_mean_on_dev_is_chosen(make: Callable[[], Summary]) -> None:
    summary = make()
    assert summary.chosen and summary.chosen.trial.label == "loss.alpha=0.1, loss.beta=1"
    assert summary.base and summary.base.trial.label == "loss.alpha=0, loss.beta=1"
    assert summary.chosen.mean == pytest.approx(0.7)
    assert math.isnan(summary.settings[-1].mean)


def test_the_worst_is_chosen_where_less_is_more(sweep: Sweep) -> None:
    less = sweep.model_copy(update={"select": sweep.select.model_copy(update={"mode": "min"})})
    results = [result(trial, int(5 * trial.axes["loss.alpha"])) for trial in trials(less)]
    summary = summarise(less, results)
    assert summary.chosen and summary.chosen.trial.axes["loss.alpha"] == 0
    first, *_, last = report.settings_table(summary)[1]
    assert first[1] == "0.0 ± 0.0" and last[1] == "50.0 ± 0.0"


def test_a_lucky_seed_alone_does_not_win(sweep: Sweep) -> None:
    found = trials(sweep)
    results = [result(trial, 5) for trial in found[:4]]
    results += [result(found[4], 10), Result(trial=found[5], error="no")]
    summary = summarise(sweep, results)
    assert summary.chosen is summary.settings[0]
    alone = summarise(sweep, results[4:])
    assert alone.chosen and alone.chosen.trial == found[4] and alone.base is None


def test_differences_average_each_item_over_the_seeds_that_both_have(
    make: Callable[[], Summary], sweep: Sweep
) -> None:
    summary = make()
    key = ("mmlu", "dev")
    base, other = summary.base, summary.settings[1]
    assert base is not None
    first = {str(i): (i < 5) / 2 + (i < 5) / 2 for i in range(10)}
    second = {str(i): (i < 4) / 2 + (i < 6) / 2 for i in range(10)}
    assert versus(base, other, key) == compare(first, second, metric="accuracy")
    assert versus(base, base, key) is None
    assert versus(base, summary.settings[-1], key) is None
    found = trials(sweep)
    one = summarise(
        sweep,
        [
            result(found[0], 5),
            Result(trial=found[1], error="no"),
            *[result(t, 8) for t in found[2:4]],
        ],
    )
    difference = versus(one.base, one.settings[1], key)
    assert difference and difference.test == "McNemar"  # one seed in common: right or wrong
    assert difference.difference == pytest.approx(0.3)


def test_the_table_of_settings(make: Callable[[], Summary]) -> None:
    summary = make()
    head, body = report.settings_table(summary)
    assert head == ["setting", "mmlu dev", "to base (95%)", "p", "seeds"]
    assert [row[0] for row in body] == [
        "loss.alpha=0.1, loss.beta=1 *",
        "loss.alpha=0, loss.beta=1 (base)",
        "loss.alpha=0, loss.beta=2",
        "loss.alpha=0.1, loss.beta=2",
        "loss.alpha=1, loss.beta=1",
        "loss.alpha=1, loss.beta=2",
    ]
    assert body[0][1] == "70.0 ± 14.1" and body[0][2].startswith("+20.0 (")
    assert body[0][4] == "2/2"
    assert body[1][1:4] == ["50.0 ± 0.0", "", ""]
    assert body[-1][1:] == ["-", "", "", "0/2, 1 failed, 1 stopped early"]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table.terminal("sweep", head, body))
    assert any("loss.beta=1 *" in line and "2/2" in line for line in captured.get().splitlines())


def test_only_the_chosen_and_the_base_are_shown_on_test(make: Callable[[], Summary]) -> None:
    summary = make()
    head, body = report.chosen_table(summary)
    assert head == ["test", "mmlu", "gsm8k", "to base (95%), mmlu", "p"]
    assert [row[0] for row in body] == ["loss.alpha=0, loss.beta=1", "loss.alpha=0.1, loss.beta=1"]
    assert body[0][1] == "45.0 ± 7.1"
    rows = list(csv.DictReader(io.StringIO(report.csv_text(summary))))
    assert len(rows) == 12 and rows[0]["dev/mmlu"] == "0.5" and rows[0]["loss.alpha"] == "0"
    assert [bool(row["test/mmlu"]) for row in rows] == [
        True,
        True,
        False,
        False,
        True,
        True,
        *[False] * 6,
    ]
    assert rows[-2]["state"] == "failed" and rows[-1]["state"] == "stopped early"
    assert rows[-2]["error"].endswith("RuntimeError: out of luck\n")


def test_a_comparison_hides_nothing(tmp_path: Path) -> None:
    file = tmp_path / "methods.yaml"
    file.write_text("axes: {method: [sft, laten]}\ncompare: {axis: method, control: sft}\n")
    sweep = load_sweep(file)
    summary = summarise(sweep, [result(trial, 5, 7) for trial in trials(sweep)])
    rows = list(csv.DictReader(io.StringIO(report.csv_text(summary))))
    assert [(row["method"], row["test/mmlu"]) for row in rows] == [("sft", "0.7"), ("laten", "0.7")]


def test_the_base_may_be_the_best(sweep: Sweep) -> None:
    summary = summarise(sweep, [result(trial, 5) for trial in trials(sweep)])
    assert summary.chosen is summary.base
    assert len(report.chosen_table(summary)[1]) == 1
    assert report.settings_table(summary)[1][0][0] == "loss.alpha=0, loss.beta=1 (base) *"


def test_markdown_says_it_all(make: Callable[[], Summary]) -> None:
    text = report.sweep_markdown(make())
    assert text.startswith("# Sweep weights\n\nhow much alignment\n\nPercent, mean")
    for part in (
        "## Chosen on mmlu dev",
        "Chosen (*): loss.alpha=0.1, loss.beta=1",
        "## On test, once",
        "## Failed\n\n| trial | seed | error |",
        "| loss.alpha=1, loss.beta=2 | 0 | RuntimeError: out of luck |",
    ):
        assert part in text
    assert text.count("\n\n\n") == 0


def test_nothing_finished(sweep: Sweep) -> None:
    summary = summarise(sweep, [Result(trial=trial, error="no") for trial in trials(sweep)])
    assert summary.chosen is None and report.draw(summary) == {}
    assert "nothing is chosen" in report.sweep_markdown(summary)
    assert report.csv_text(summary).count("\n") == 13


def test_references_stand_beside(sweep: Sweep) -> None:
    scores = {
        (task, split): score([1.0, 1.0, 0.0, 1.0])
        for task in ("mmlu", "gsm8k")
        for split in ("dev", "test")
    }
    results = [result(trial, 5) for trial in trials(sweep)]
    summary = summarise(sweep, results, {"teacher": scores})
    assert report.settings_table(summary)[1][0] == ["teacher", "75.0", "", "", ""]
    assert report.chosen_table(summary)[1][0] == ["teacher", "75.0", "75.0", "", ""]


def test_the_best_as_yaml_is_the_same_transfer(sweep: Sweep, tmp_path: Path) -> None:
    for trial in trials(sweep):
        file = tmp_path / "best.yaml"
        file.write_text(report.best_yaml(trial))
        again = resolve([file])
        assert again == trial.config
        assert str(tmp_path) not in file.read_text() and "workdir" not in file.read_text()


def test_records_become_a_result(sweep: Sweep) -> None:
    trial = trials(sweep)[0]
    rows = records("++-+", split="dev")
    made = finished(trial, {("mmlu", "dev"): rows}, 3.0)
    right = {f"mmlu/{place}": value for place, value in items("++-+").items()}
    assert made.state == "finished" and made.items["mmlu", "dev"] == right
    assert made.score(("mmlu", "dev")) == 0.75


def test_figures_of_a_grid(make: Callable[[], Summary], tmp_path: Path) -> None:
    drawn = report.draw(make())
    assert list(drawn) == ["parallel_coordinates", "loss.alpha-loss.beta"]
    heat = drawn["loss.alpha-loss.beta"].axes[0]
    assert (heat.get_xlabel(), heat.get_ylabel()) == ("loss.alpha", "loss.beta")
    assert [t.get_text() for t in heat.get_xticklabels()] == ["0", "0.1", "1"]
    written = {(t.get_position(), t.get_text()) for t in heat.texts}
    assert written == {
        ((0, 0), "50.0"),
        ((0, 1), "50.0"),
        ((1, 0), "70.0"),
        ((1, 1), "50.0"),
        ((2, 0), "30.0"),
    }
    lines = [
        line for line in drawn["parallel_coordinates"].axes[0].lines if line.get_marker() == "o"
    ]
    assert len(lines) == 5
    best = lines[-1]  # drawn last, on top
    assert list(best.get_ydata()) == [0.5, 0.0]
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.png")


def test_pairs_become_two_axes_of_layers(tmp_path: Path) -> None:
    file = tmp_path / "pairs.yaml"
    file.write_text("axes: {pairing.explicit: [[[1, 1]], [[2, 1]], [[1, 2]], [[2, 2]]]}\n")
    sweep = load_sweep(file)
    summary = summarise(sweep, [result(trial, 5) for trial in trials(sweep)])
    drawn = report.draw(summary)
    name = "teacher_layer-student_layer"
    assert list(drawn) == ["parallel_coordinates", name]
    plot = drawn[name].axes[0]
    assert plot.get_xlabel() == "teacher layer (counted from 1)"
    assert [t.get_text() for t in plot.get_xticklabels()] == ["1", "2"]


def test_draws_are_on_a_line_and_on_no_heat_map(tmp_path: Path) -> None:
    file = tmp_path / "draws.yaml"
    file.write_text(
        "axes: {loss.alpha: {uniform: [0.1, 1]}, alignment.map: [cosine, dual]}\nsamples: 12\n"
    )
    sweep = load_sweep(file)
    drawn = report.draw(summarise(sweep, [result(trial, 5) for trial in trials(sweep)]))
    assert list(drawn) == ["parallel_coordinates"]
    lines = [
        line for line in drawn["parallel_coordinates"].axes[0].lines if line.get_marker() == "o"
    ]
    heights = [line.get_ydata()[0] for line in lines]
    assert len(lines) == 24 and min(heights) == 0 and max(heights) == 1


def test_a_heat_map_averages_what_it_does_not_show() -> None:
    figure = heat_map(("a", [1, 1, 2]), ("b", ["x", "x", "y"]), [10.0, 20.0, 30.0], "score")
    assert {t.get_text() for t in figure.axes[0].texts} == {"15.0", "30.0"}


def test_one_axis_and_one_value_are_drawn() -> None:
    parallel_coordinates({"a": [1]}, [50.0], "score")
    parallel_coordinates({"a": ["x", "y"]}, [50.0, 50.0], "score")
