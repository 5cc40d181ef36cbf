"""Tables that compare the methods of a sweep, task by task (the paper's Tables 1 and 2).

Nothing is chosen: every row is on the report split. Scores in percent, mean ± standard deviation
over seeds; gaps and differences in points.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from semalign.report import table
from semalign.report.sweep import Rows, difference, failures_table, limit_note, spread
from semalign.sweep.file import Compare
from semalign.sweep.summary import MetricKey, Result, Summary, SweptSetting, versus
from semalign.sweep.trials import value_text

_GROUPS = {"data.task", "teacher"}  # the columns of the tables and the groups of their rows
COMPARISON_NOTE = (
    "Percent, mean ± standard deviation over seeds. A gap is the teacher's score minus the row's, "
    "a difference the row's minus the control's, in points: item by item with each item's score "
    "averaged over seeds, 95% interval by bootstrap over items. p-values are not corrected for "
    "their number."
)


@dataclass(frozen=True)
class ComparisonRow:
    """One method under one teacher, at one point of the other axes: its setting for each task."""

    teacher: str
    method: str
    others: tuple[str, ...]
    settings: Mapping[str, SweptSetting]

    @property
    def name(self) -> str:
        return ", ".join((self.method, *self.others))

    def scores(self, task: str, split: str) -> list[float]:
        """One score a seed that finished."""
        return self.settings[task].scores((task, split)) if task in self.settings else []


@dataclass(frozen=True)
class Tables:
    """The rows of a comparison, those of a teacher together and in the order of the axis."""

    summary: Summary

    @property
    def split(self) -> str:
        return self.summary.sweep.report.split

    @cached_property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(s.trial.config.data.task for s in self.summary.settings))

    @cached_property
    def rows(self) -> list[ComparisonRow]:
        axis = self._compare.axis
        grouped = {axis} | {a.name for a in self.summary.sweep.axes if a.keys & _GROUPS}
        found: dict[tuple[str, str, tuple[str, ...]], dict[str, SweptSetting]] = {}
        for setting in self.summary.settings:
            trial = setting.trial
            if axis not in trial.axes:
                continue  # the base, where it is at no point of the axes
            others = tuple(value_text(v) for name, v in trial.axes.items() if name not in grouped)
            key = trial.config.teacher, value_text(trial.axes[axis]), others
            found.setdefault(key, {})[trial.config.data.task] = setting
        teachers = list(dict.fromkeys(teacher for teacher, _, _ in found))
        ordered = sorted(found, key=lambda key: teachers.index(key[0]))
        return [ComparisonRow(*key, found[key]) for key in ordered]

    @property
    def _compare(self) -> Compare:
        assert self.summary.sweep.compare is not None
        return self.summary.sweep.compare

    def control(self, row: ComparisonRow) -> ComparisonRow | None:
        """The control's row of the same teacher and settings; None for the control itself."""
        if row.method == self._compare.control:
            return None
        same = (self._compare.control, row.teacher, row.others)
        return next((r for r in self.rows if (r.method, r.teacher, r.others) == same), None)

    def scores(self) -> Rows:
        """Models and methods under each teacher, a column a task, and the mean gap to it."""
        head = [self.split, *self.tasks, "mean gap"]
        body = []
        teachers = list(dict.fromkeys(row.teacher for row in self.rows))
        students = [name for name in self.summary.references if name not in teachers]
        for teacher in teachers:
            for name in students:
                body.append([f"student {name}", *self._reference(name), self._gap(teacher, name)])
            body.append([f"teacher {teacher}", *self._reference(teacher), ""])
            for row in (row for row in self.rows if row.teacher == teacher):
                cells = [self._cell(row, task) for task in self.tasks]
                body.append([row.name, *cells, self._mean_gap(row)])
        return head, body

    def _named(self, row: ComparisonRow) -> str:
        many = len({row.teacher for row in self.rows}) > 1
        return f"{row.name} ({row.teacher})" if many else row.name

    def _reference(self, name: str) -> list[str]:
        scores = self.summary.references[name]
        return [table.cell(scores[task, self.split]) for task in self.tasks]

    def _gap(self, teacher: str, name: str) -> str:
        found = [self._teacher(teacher, t) - self._teacher(name, t) for t in self.tasks]
        return f"{100 * statistics.fmean(found):.2f}"

    def _teacher(self, name: str, task: str) -> float:
        return self.summary.references[name][task, self.split].value

    def _cell(self, row: ComparisonRow, task: str) -> str:
        scores = row.scores(task, self.split)
        if not scores:
            return "-"
        gap = 100 * (self._teacher(row.teacher, task) - statistics.fmean(scores))
        return f"{spread(scores)} (gap {gap:.1f})"

    def _mean_gap(self, row: ComparisonRow) -> str:
        scores = {task: row.scores(task, self.split) for task in self.tasks}
        if not all(scores.values()):
            return "-"
        gaps = [self._teacher(row.teacher, t) - statistics.fmean(s) for t, s in scores.items()]
        return f"{100 * statistics.fmean(gaps):.2f}"

    def differences(self) -> Rows:
        """Each method minus the control, a task at a time, with interval and p-value."""
        head = [f"{self.split}, to {self._compare.control}", *self.tasks]
        body = []
        for row in self.rows:
            if (control := self.control(row)) is not None:
                cells = [self._difference(control, row, task) for task in self.tasks]
                body.append([self._named(row), *cells])
        return head, body

    def _difference(self, control: ComparisonRow, row: ComparisonRow, task: str) -> str:
        if task not in row.settings or task not in control.settings:
            return "-"
        key: MetricKey = (task, self.split)
        by, p = difference(versus(control.settings[task], row.settings[task], key))
        return f"{by}, p {p}" if by else "-"

    def costs(self) -> Rows:
        """Parameters, seconds and memory of each method's training, the mean over its trials."""
        head = ["method", "trained parameters", "training, s", "peak memory, GB"]
        body = []
        for row in self.rows:
            results = [r for setting in row.settings.values() for r in setting.finished]
            if not results:
                continue
            body.append(
                [
                    self._named(row),
                    f"{_mean(results, 'trained_parameters'):,.0f}",
                    f"{_mean(results, 'seconds'):.1f}",
                    f"{max(result.cost['peak_bytes'] for result in results) / 1e9:.2f}",
                ]
            )
        return head, body


def _mean(results: Sequence[Result], name: str) -> float:
    return statistics.fmean(result.cost[name] for result in results)


def comparison_markdown(summary: Summary) -> str:
    """All tables as Markdown, with their headings and the note on their numbers."""
    tables = Tables(summary)
    note = COMPARISON_NOTE + limit_note(summary)
    parts = [f"# Sweep {summary.sweep.name}", summary.sweep.description, note]
    parts += [f"## On {tables.split}", table.markdown(*tables.scores())]
    parts += ["## Against the control", table.markdown(*tables.differences())]
    parts += ["## Costs", table.markdown(*tables.costs())]
    if (failures := failures_table(summary))[1]:
        parts += ["## Failed", table.markdown(*failures)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"
