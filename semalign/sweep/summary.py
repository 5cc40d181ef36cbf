"""What a sweep found: its trials by setting, each compared with the base, and the one chosen.

Scores are fractions, differences setting minus base.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from semalign.artifacts.records import Record, item_scores
from semalign.core.statistics import Comparison, Score, compare
from semalign.stages.scoring import chosen_protocol
from semalign.sweep.file import Sweep
from semalign.sweep.trials import Trial
from semalign.tasks import find_task

MetricKey = tuple[str, str]  # task, split
COSTS = ("trained_parameters", "seconds", "peak_bytes")


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a trial ended: with the score of every item by (task, split) and item id; with the error
    that ended it; or with neither, when the scheduler stopped it early.

    `cost`: of the training, `trained_parameters`, `seconds` and `peak_bytes` of a worker.
    """

    trial: Trial
    items: Mapping[MetricKey, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    cost: Mapping[str, float] = field(default_factory=dict)

    @property
    def state(self) -> str:
        if self.error is not None:
            return "failed"
        return "finished" if self.items else "stopped early"

    def score(self, key: MetricKey) -> float:
        """The mean over the items."""
        return statistics.fmean(self.items[key].values())


def finished(
    trial: Trial,
    records: Mapping[MetricKey, Sequence[Record]],
    seconds: float,
    manifest: Mapping[str, Any] | None = None,
) -> Result:
    """A trial that was scored, from the records of each task and split, and the manifest of what
    it trained.
    """
    protocol = chosen_protocol(trial.config.evaluation)
    items = {key: item_scores(rows, k=protocol.profile(key[0]).k) for key, rows in records.items()}
    cost = {name: float((manifest or {}).get(name, math.nan)) for name in COSTS}
    return Result(trial=trial, items=items, seconds=seconds, cost=cost)


@dataclass(frozen=True, kw_only=True, eq=False)
class SweptSetting:
    """The trials of one configuration, a seed each. `metric`: what settings are chosen by."""

    results: tuple[Result, ...]
    metric: MetricKey

    @property
    def trial(self) -> Trial:
        return self.results[0].trial

    @property
    def finished(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.state == "finished")

    @property
    def mean(self) -> float:
        """Over the seeds that finished; NaN without any."""
        scores = self.scores(self.metric)
        return statistics.fmean(scores) if scores else math.nan

    def scores(self, key: MetricKey) -> list[float]:
        """One a seed that finished."""
        return [result.score(key) for result in self.finished]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A sweep's settings in the order of its trials, the one chosen, and models for comparison."""

    sweep: Sweep
    settings: tuple[SweptSetting, ...]
    chosen: SweptSetting | None
    references: Mapping[str, Mapping[MetricKey, Score]]

    @property
    def metric(self) -> MetricKey:
        """What settings are chosen by."""
        return str(self.sweep.select.metric), self.sweep.select.split

    @property
    def base(self) -> SweptSetting | None:
        return next((setting for setting in self.settings if setting.trial.base), None)

    @property
    def results(self) -> list[Result]:
        return [result for setting in self.settings for result in setting.results]


def summarise(
    sweep: Sweep,
    results: Iterable[Result],
    references: Mapping[str, Mapping[MetricKey, Score]] | None = None,
) -> Summary:
    """Gather results, in the order of the trials, by setting; choose the best mean on the
    selection split, of equal ones the first.

    Chosen is among the settings with the most finished seeds, so that a setting whose other seeds
    failed or were stopped does not win by the one that was lucky.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.trial.setting, []).append(result)
    settings = tuple(
        SweptSetting(results=tuple(group), metric=sweep.metric(group[0].trial.config.data.task))
        for group in groups.values()
    )
    if sweep.compare is not None:
        return Summary(sweep=sweep, settings=settings, chosen=None, references=references or {})
    most = max((len(setting.finished) for setting in settings), default=0)
    eligible = [setting for setting in settings if most and len(setting.finished) == most]
    best = max if sweep.select.mode == "max" else min
    return Summary(
        sweep=sweep,
        settings=settings,
        chosen=best(eligible, key=lambda setting: setting.mean, default=None),
        references=references or {},
    )


def versus(base: SweptSetting | None, setting: SweptSetting, key: MetricKey) -> Comparison | None:
    """Setting minus base, each item's score averaged over the seeds that both have; or None.

    The test draws items, the same under both: it tells nothing about seeds that were not run.
    """
    if base is None or base is setting:
        return None
    both = {r.trial.seed for r in base.finished} & {r.trial.seed for r in setting.finished}
    if not both:
        return None
    first, second = (
        _mean_items([r.items[key] for r in side.finished if r.trial.seed in both])
        for side in (base, setting)
    )
    return compare(first, second, metric=find_task(key[0]).metric)


def _mean_items(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {id: statistics.fmean(run[id] for run in runs) for id in runs[0]}
