"""The table a transfer ends with, in the manner of the paper's Table 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from semalign.tasks.scores import Score

# (candidate, task, split) -> score
Scores = Mapping[tuple[str, str, str], Score]


def rows(
    scores: Scores, candidates: Sequence[str], tasks: Sequence[str], split: str, teacher: str
) -> list[list[str]]:
    """One row a candidate: per task `value [low, high]` in percent, then the mean gap in points.

    The gap is the teacher's score minus the candidate's, averaged over the tasks.
    """
    result = []
    for candidate in candidates:
        cells = [candidate]
        gaps = []
        for task in tasks:
            score = scores[candidate, task, split]
            cells.append(f"{100 * score.value:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]")
            gaps.append(100 * (scores[teacher, task, split].value - score.value))
        result.append([*cells, f"{sum(gaps) / len(gaps):+.2f}"])
    return result


def header(
    scores: Scores, candidate: str, tasks: Sequence[str], split: str, trained: str
) -> list[str]:
    """Column titles with the number of items; the task trained on is marked with a star."""
    counts = {task: scores[candidate, task, split].n for task in tasks}
    titles = [f"{task}{'*' if task == trained else ''} (n={counts[task]})" for task in tasks]
    return [split, *titles, "mean gap to teacher"]


def terminal(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    """For rich's console."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(head):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in body:
        table.add_row(*row)
    return table


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
