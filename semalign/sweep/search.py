"""Optuna's suggestions for the axes of a sweep, from the scores of those before.

Suggestions come in rounds of a few, so that trials share what is made once and run side by side.
They depend on nothing but the sweep and the scores so far: a rerun is given the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from semalign.errors import UserError
from semalign.sweep.axes import Axis, Choices, Option
from semalign.sweep.file import Sweep

ROUND = 4  # suggestions that are made without knowing each other's scores

Point = dict[str, Option]


def load_optuna() -> Any:
    """The library. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            "search=optuna: optuna is not installed; pip install -e '.[search]', or leave search "
            "out to draw at random"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def suggest(sweep: Sweep, scored: Sequence[tuple[Point, float | None]]) -> list[Point]:
    """The next points of the space, at most a round and no more than `samples` in all.

    scored: all points so far, in their order, each with its score or, where it has none, None. By
    the tree-structured Parzen estimator; a grid axis is a categorical one.
    """
    optuna = load_optuna()
    space = {axis.name: _distribution(optuna, axis) for axis in sweep.axes}
    sampler = optuna.samplers.TPESampler(
        seed=len(scored), n_startup_trials=ROUND, constant_liar=True
    )
    direction = "maximize" if sweep.select.mode == "max" else "minimize"
    study = optuna.create_study(sampler=sampler, direction=direction)
    for point, score in scored:
        state = optuna.trial.TrialState
        study.add_trial(
            optuna.trial.create_trial(
                params={axis.name: _told(axis, point[axis.name]) for axis in sweep.axes},
                distributions=space,
                value=score,
                state=state.FAIL if score is None else state.COMPLETE,
            )
        )
    count = min(ROUND, (sweep.samples or 1) - len(scored))
    suggested = [study.ask(space).params for _ in range(count)]
    return [
        {axis.name: _option(axis, params[axis.name]) for axis in sweep.axes} for params in suggested
    ]


def _distribution(optuna: Any, axis: Axis) -> Any:
    kinds = optuna.distributions
    if isinstance(axis, Choices):
        return kinds.CategoricalDistribution(list(range(len(axis.options))))
    if axis.kind == "randint":
        return kinds.IntDistribution(int(axis.low), int(axis.high))
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.kind == "loguniform")


def _told(axis: Axis, option: Option) -> Any:
    return axis.options.index(option) if isinstance(axis, Choices) else option.value


def _option(axis: Axis, value: Any) -> Option:
    return axis.options[value] if isinstance(axis, Choices) else axis.option(axis.rounded(value))
