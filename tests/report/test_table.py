"""The final table: gaps in points, stars, and 80 columns."""

from __future__ import annotations

from rich.console import Console

from semalign.core.statistics import Score
from semalign.report import table

TASKS = ("mmlu", "gsm8k", "humaneval", "mbpp")
NAMES = ("student", "teacher", "transferred")
SCORES = {
    (name, task, "test"): Score(
        n=400, value=value, stderr=0.02, low=value - 0.05, high=value + 0.05
    )
    for name, value in zip(NAMES, (0.5, 0.75, 0.625), strict=True)
    for task in TASKS
}


def test_rows_and_gaps() -> None:
    found = table.score_rows(SCORES, NAMES, ("gsm8k", "mbpp"), "test", "teacher")
    assert found == [
        ["student", "50.0 (45-55)", "50.0 (45-55)", "+25.00"],
        ["teacher", "75.0 (70-80)", "75.0 (70-80)", "+0.00"],
        ["transferred", "62.5 (57-68)", "62.5 (57-68)", "+12.50"],
    ]


def test_the_trained_task_has_a_star() -> None:
    head = table.header(SCORES, TASKS, "test", "mbpp")
    assert head == [
        "test",
        "mmlu n=400",
        "gsm8k n=400",
        "humaneval n=400",
        "mbpp* n=400",
        "mean gap",
    ]


def test_four_tasks_fit_in_80_columns() -> None:
    console = Console(width=80)
    head = table.header(SCORES, TASKS, "test", "mbpp")
    body = table.score_rows(SCORES, NAMES, TASKS, "test", "teacher")
    with console.capture() as captured:
        console.print(table.terminal("title", head, body))
    lines = captured.get().splitlines()
    assert any("humaneval n=400" in line and "mean gap" in line for line in lines)
    assert sum("62.5 (57-68)" in line for line in lines) == 1


def test_a_long_name_wraps_and_numbers_stay_whole() -> None:
    console = Console(width=60)
    name = "extraction.interface=mlp, extraction.positions=answer, loss.alpha=0.1"
    row = [name, "66.0 ± 1.3", "+1.3 (-0.8 to 3.5)"]
    with console.capture() as captured:
        console.print(table.terminal("title", ["setting", "mmlu dev", "to base (95%)"], [row]))
    shown = captured.get()
    assert "66.0 ± 1.3 +1.3 (-0.8 to 3.5)" in shown
    assert "".join(shown.split()).count("loss.alpha=0.1") == 1


def test_markdown() -> None:
    assert table.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"


def test_what_limits_a_score_is_shown_in_percent() -> None:
    names = ("no_answer", "cut_answers", "cut_prompts", "joined_prompts")
    shares = {
        ("student", "mbpp", "test"): dict(zip(names, (0.125, 1.0, 0.0, 0.0), strict=True)),
        ("student", "gsm8k", "test"): dict(zip(names, (0.0, 0.0, 0.5, 0.25), strict=True)),
    }
    rows = table.share_rows(shares, ["student"], ["mbpp", "gsm8k"], "test")
    assert rows == [["student", "12.5/100.0/0.0", "0.0/0.0/50.0"]]
    assert table.joined_prompts(shares) == [
        "gsm8k test, student: 25.0% of the prompts end within a token of the reference text"
    ]
