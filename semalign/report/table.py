"""The table at the end of a transfer, in the form of the paper's Table 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from semalign.core.statistics import Score
from semalign.tasks.protocols import Protocol

# (candidate, task, split) -> score
Scores = Mapping[tuple[str, str, str], Score]
# the same -> see semalign.artifacts.records.shares
Shares = Mapping[tuple[str, str, str], Mapping[str, float]]


def score_rows(
    scores: Scores,
    candidates: Sequence[str],
    tasks: Sequence[str],
    split: str,
    teacher: str | None = None,
) -> list[list[str]]:
    """One row a candidate: per task the score in percent with its 95% interval.

    With a teacher, the mean gap follows: its score minus the candidate's in points, averaged over
    the tasks.
    """
    result = []
    for candidate in candidates:
        found = [scores[candidate, task, split] for task in tasks]
        if teacher is None:
            result.append([candidate, *map(cell, found)])
            continue
        gaps = [
            100 * (scores[teacher, task, split].value - score.value)
            for task, score in zip(tasks, found, strict=True)
            if score.value >= 0  # a perplexity has no points
        ]
        gap = f"{sum(gaps) / len(gaps):+.2f}" if gaps else ""
        result.append([candidate, *map(cell, found), gap])
    return result


def cell(score: Score) -> str:
    """`72.5 (68-77)`: percent, and the ends of the 95% interval; of a corpus, whose scores are
    log-probabilities, the perplexity: `2.14 (2.02-2.27)`.
    """
    return interval(score.value, score.low, score.high)


def interval(value: float, low: float, high: float) -> str:
    """A score and the ends of its interval, as `cell` shows them."""
    if value < 0:
        return f"{number(value)} ({number(high)}-{number(low)})"
    return f"{number(value)} ({100 * low:.0f}-{100 * high:.0f})"


def number(value: float) -> str:
    """A score in percent; a log-probability, which is negative, as the perplexity of a byte."""
    return f"{shown(value):.2f}" if value < 0 else f"{shown(value):.1f}"


def shown(value: float) -> float:
    """The number that `number` writes."""
    return math.exp(-value) if value < 0 else 100 * value


def header(
    scores: Scores, tasks: Sequence[str], split: str, trained: str | None = None
) -> list[str]:
    """Column titles with the number of items; the task trained on is marked with a star, and only
    a table with one has a mean gap.
    """
    counts = {task: score.n for (_, task, where), score in scores.items() if where == split}
    titles = [f"{task}{'*' if task == trained else ''} n={counts[task]}" for task in tasks]
    return [split, *titles, *(["mean gap"] if trained else [])]


SHARES = "percent of outputs without an answer / cut by their limit of tokens / with a cut prompt"


def share_rows(
    shares: Shares, candidates: Sequence[str], tasks: Sequence[str], split: str
) -> list[list[str]]:
    """One row a candidate: per task what `SHARES` names, in percent of its outputs."""
    names = ("no_answer", "cut_answers", "cut_prompts")
    return [
        [
            candidate,
            *(
                "/".join(f"{100 * shares[candidate, task, split][name]:.1f}" for name in names)
                for task in tasks
            ),
        ]
        for candidate in candidates
    ]


def joined_prompts(shares: Shares) -> list[str]:
    """One line for each score under which the tokenizer joins prompts with their answers."""
    return [
        f"{task} {split}, {candidate}: {100 * found['joined_prompts']:.1f}% of the prompts end "
        "within a token of the reference text"
        for (candidate, task, split), found in shares.items()
        if found["joined_prompts"]
    ]


def protocol(protocol: Protocol) -> str:
    """`paper-1 (3f2a9c41)`: the protocol of a table's scores."""
    return f"{protocol.name}-{protocol.version} ({protocol.hash[:8]})"


def new_console() -> Console:
    """A console of the terminal's width, or wide enough for any table where output is a file."""
    plain: Any = {"soft_wrap": True, "markup": False, "emoji": False}  # names may hold [a], :b:
    console = Console(**plain)
    return console if console.is_terminal else Console(**plain, width=240)


def terminal(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    """A table for rich's console: four tasks fit in 80 columns, and the first column can wrap."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0
    )
    for index, column in enumerate(head):
        if index == 0:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    return table


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [[cell.replace("|", r"\|") for cell in row] for row in (head, *body)]
    lines = [rows[0], ["---", *["---:"] * (len(head) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
