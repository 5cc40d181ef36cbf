"""A finished sweep as tables, Markdown, CSV, figures and the best configuration.

Percent, mean ± standard deviation over seeds. The report split is shown for the chosen setting and
the base alone.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import yaml
from matplotlib.figure import Figure

from semalign.config.dotted import nested
from semalign.core.statistics import Comparison
from semalign.methods.method import used_settings
from semalign.names import file_name
from semalign.report import figures, table
from semalign.sweep.summary import Summary, SweptSetting, versus
from semalign.sweep.trials import Trial, value_text

Rows = tuple[list[str], list[list[str]]]  # a table's header and body

SWEEP_NOTE = (
    "Percent, mean ± standard deviation over seeds. Differences are to the base, item by item with "
    "each item's score averaged over seeds; p-values are not corrected for the number of settings."
)


def settings_table(summary: Summary) -> Rows:
    """Every setting, best first: mean ± sd over seeds, difference to the base, finished seeds."""
    metric, split = summary.metric
    head = ["setting", f"{metric} {split}", "to base (95%)", "p", "seeds"]
    worst = -math.inf if summary.sweep.select.mode == "max" else math.inf
    ordered = sorted(
        summary.settings,
        key=lambda setting: setting.mean if setting.finished else worst,
        reverse=summary.sweep.select.mode == "max",
    )
    body = [
        [name, table.number(scores[metric, split].value), "", "", ""]
        for name, scores in summary.references.items()
    ]
    return head, body + [_setting_row(summary, setting) for setting in ordered]


def _setting_row(summary: Summary, setting: SweptSetting) -> list[str]:
    label = setting.trial.label
    notes = " (base)" if setting.trial.base and label != "base" else ""
    notes += " *" if setting is summary.chosen else ""
    states = [result.state for result in setting.results]
    seeds = [f"{states.count('finished')}/{len(states)}"]
    seeds += [f"{states.count(s)} {s}" for s in ("failed", "stopped early") if s in states]
    return [
        label + notes,
        spread(setting.scores(setting.metric)),
        *difference(versus(summary.base, setting, setting.metric)),
        ", ".join(seeds),
    ]


def difference(found: Comparison | None) -> tuple[str, str]:
    """`+1.2 (-0.3 to 2.8)` in points, and the p-value; empty where nothing was compared."""
    if found is None:
        return "", ""
    low, high = 100 * found.low, 100 * found.high
    return (
        f"{100 * found.difference:+z.1f} ({low:z.1f} to {high:z.1f})",
        "<0.001" if found.p < 0.001 else f"{found.p:.2g}",
    )


def spread(scores: Sequence[float]) -> str:
    """`64.7 ± 1.6`: mean and standard deviation of fractions, in percent; of log-probabilities, as
    perplexities.
    """
    if not scores:
        return "-"
    mean = table.number(statistics.fmean(scores))
    if len(scores) == 1:
        return mean
    if min(scores) < 0:
        return f"{mean} ± {statistics.stdev(math.exp(-score) for score in scores):.2f}"
    return f"{mean} ± {100 * statistics.stdev(scores):.1f}"


def chosen_table(summary: Summary) -> Rows:
    """The base and the chosen setting on the report split, every task."""
    split, (metric, _) = summary.sweep.report.split, summary.metric
    base, chosen = summary.base, summary.chosen
    shown = [s for s in dict.fromkeys((base, chosen)) if s is not None and s.finished]
    keys = dict.fromkeys(key for setting in shown for key in setting.finished[0].items)
    tasks = [task for task, where in keys if where == split]
    head = [split, *tasks, f"to base (95%), {metric}", "p"]
    body = [
        [name, *(table.number(scores[task, split].value) for task in tasks), "", ""]
        for name, scores in summary.references.items()
    ]
    for setting in shown:
        scores = [spread(setting.scores((task, split))) for task in tasks]
        compared = difference(versus(base, setting, (metric, split)))
        body.append([setting.trial.label, *scores, *compared])
    return head, body


def failures_table(summary: Summary) -> Rows:
    """The trials that failed, with the last line of their error: a traceback's message."""
    return ["trial", "seed", "error"], [
        [r.trial.label, str(r.trial.seed), r.error.strip().splitlines()[-1]]
        for r in summary.results
        if r.error
    ]


def sweep_markdown(summary: Summary) -> str:
    """All tables as Markdown, with their headings and the note on their numbers."""
    sweep, chosen = summary.sweep, summary.chosen
    select, split = sweep.select, sweep.report.split
    parts = [f"# Sweep {sweep.name}", sweep.description, SWEEP_NOTE + limit_note(summary)]
    parts += [
        f"## Chosen on {select.metric} {select.split}",
        table.markdown(*settings_table(summary)),
    ]
    if chosen is None:
        parts.append("No trial finished, so nothing is chosen.")
    else:
        parts.append(
            f"Chosen (*): {chosen.trial.label}, the best of those with the most seeds finished."
        )
        parts += [f"## On {split}, once", table.markdown(*chosen_table(summary))]
    if (failures := failures_table(summary))[1]:
        parts += ["## Failed", table.markdown(*failures)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def limit_note(summary: Summary) -> str:
    """Which items of each split are scored, where those are not all."""
    limited = summary.settings[0].trial.config.evaluation.limited
    return f" Scored are the {limited} of each split." if limited else ""


def csv_text(summary: Summary) -> str:
    """The trials as CSV, one row each, with scores as fractions.

    Where a setting is chosen, only it and the base have scores on the report split.
    """
    shown = {s.trial.setting for s in (summary.base, summary.chosen) if s is not None}
    compared = summary.sweep.compare is not None
    keys = list(dict.fromkeys(key for result in summary.results for key in result.items))
    keys = [
        key for key in keys if key[1] in (summary.sweep.select.split, summary.sweep.report.split)
    ]
    axes = [axis.name for axis in summary.sweep.axes]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fixed = ["id", "setting", "label", "seed", "base", "state", "seconds", "error"]
    writer.writerow([*fixed, *axes, *(f"{split}/{task}" for task, split in keys)])
    for result in summary.results:
        trial = result.trial
        row = [trial.id, trial.setting, trial.label, trial.seed, trial.base, result.state]
        row += [f"{result.seconds:.1f}", result.error or ""]
        row += [value_text(trial.axes[name]) if name in trial.axes else "" for name in axes]
        reported = compared or trial.setting in shown
        hidden = set() if reported else {summary.sweep.report.split}
        row += [
            f"{result.score(key):.6g}" if key in result.items and key[1] not in hidden else ""
            for key in keys
        ]
        writer.writerow(row)
    return text.getvalue()


def best_yaml(trial: Trial) -> str:
    """The trial's whole configuration, as a file that a transfer takes as it is.

    Settings of where and how it ran, and those without an effect, are left out.
    """
    tree = nested(used_settings(trial.config))
    return f"# trial {trial.id}: {trial.label}\n" + yaml.safe_dump(tree, sort_keys=False)


def draw(summary: Summary) -> dict[str, Figure]:
    """Figures by file name: parallel coordinates over all axes, a heat map for each two axes.

    A cell of a heat map is the mean over the axes that are not on it.
    """
    metric, split = summary.metric
    done = [s for s in summary.settings if s.finished and s.trial.axes]
    if not done:
        return {}
    label = f"{metric} {split} (%)"
    values = [100 * setting.mean for setting in done]
    axes = _coordinates(summary, done)
    drawn = {"parallel_coordinates": figures.parallel_coordinates(axes, values, label)}
    ranges = {axis.name for axis in summary.sweep.ranges}
    for (x, xs), (y, ys) in itertools.combinations(axes.items(), 2):
        if ranges.isdisjoint((x, y)):
            drawn[f"{_short(x)}-{_short(y)}"] = figures.heat_map((x, xs), (y, ys), values, label)
    return drawn


def _short(axis: str) -> str:
    """`teacher layer (counted from 1)` -> `teacher_layer`, for a file's name."""
    return file_name(axis.partition(" (")[0].replace(" ", "_"))


def _coordinates(summary: Summary, settings: Sequence[SweptSetting]) -> dict[str, list[Any]]:
    """The value of each axis that varies, a setting each; single pairs as two axes of layers."""
    axes: dict[str, list[Any]] = {}
    for axis in summary.sweep.axes:
        values = [setting.trial.axes[axis.name] for setting in settings]
        if axis.name == "pairing.explicit" and all(len(pairs) == 1 for pairs in values):
            axes["teacher layer (counted from 1)"] = [pairs[0][0] for pairs in values]
            axes["student layer (counted from 1)"] = [pairs[0][1] for pairs in values]
        else:
            axes[axis.name] = [v if isinstance(v, int | float) else value_text(v) for v in values]
    return {name: values for name, values in axes.items() if len(set(values)) > 1}
