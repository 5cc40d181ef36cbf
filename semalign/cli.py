"""From a command line to a configuration, and from an error to one line and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from semalign.config.jobs import AnalysisJob, Config, EvaluationJob
from semalign.config.read import Schema, resolve
from semalign.errors import Failed, UserError

USAGE = """usage: python ray_jobs/{job}.py [--plan] [file.yaml ...] [key=value ...]

  --plan       say what would happen, and stop; loads no weights
  file.yaml    configuration; later files win
  key=value    dotted override, e.g. {example}
"""
_EXAMPLES: dict[type, tuple[str, str]] = {
    Config: ("transfer", "pairing.strategy=interpolated loss.alpha=0.3"),
    EvaluationJob: ("evaluate", "model=zoo/student tasks=[humaneval,mbpp] protocol=paper"),
    AnalysisJob: ("analyze", "figure=similarity teacher=zoo/teacher student=zoo/student"),
}


def parse(
    arguments: Sequence[str],
    schema: type[Schema] = Config,  # type: ignore[assignment]
) -> tuple[Schema, bool]:
    """The configuration, and whether only a plan is wanted."""
    words = [word for word in arguments if word != "--plan"]
    for word in words:
        if word.startswith("-"):
            raise UserError(f"{word}: unknown option; expected --plan, --help, a file or key=value")
    files = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    return resolve(files, overrides, schema), len(words) < len(arguments)


def main(
    arguments: Sequence[str],
    schema: type[Schema] = Config,  # type: ignore[assignment]
    *,
    run: Callable[[Schema], object],
    plan: Callable[[Schema], object],
) -> int:
    """Exit status: 0 done, 1 the run failed, 2 bad input."""
    if "--help" in arguments or "-h" in arguments:
        job, example = _EXAMPLES[schema]
        print(USAGE.format(job=job, example=example))
        return 0

    def act() -> None:
        config, only_plan = parse(arguments, schema)
        (plan if only_plan else run)(config)

    return _status(act)


def _status(act: Callable[[], None]) -> int:
    """The exit status of `act`, whose error is said in one line."""
    try:
        act()
    except UserError as error:
        # raised in another process, it comes wrapped with that process's traceback
        print(f"error: {getattr(error, 'cause', None) or error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


SWEEP_USAGE = """usage: python ray_jobs/ablate.py sweep=FILE [--plan] [--yes] [key=value ...]

  sweep=FILE       the sweep, e.g. sweeps/pairing.yaml
  --plan           say what would happen and cost, and stop; loads no weights
  --yes            run more than 10,000 trials
  key=value        override of the sweep's base, e.g. training.epochs=1
  sweep.key=value  override of the sweep itself, e.g. sweep.seeds=[0]
"""


def main_sweep(
    arguments: Sequence[str],
    *,
    run: Callable[..., object],
    plan: Callable[..., object],
) -> int:
    """As `main`, for a sweep."""
    if "--help" in arguments or "-h" in arguments:
        print(SWEEP_USAGE)
        return 0
    return _status(lambda: _sweep(arguments, run, plan))


def _sweep(
    arguments: Sequence[str], run: Callable[..., object], plan: Callable[..., object]
) -> None:
    options = {word for word in arguments if word.startswith("-")}
    if unknown := options - {"--plan", "--yes"}:
        raise UserError(f"{min(unknown)}: unknown option; expected --plan, --yes or key=value")
    words = [word for word in arguments if word not in options]
    files = [word.removeprefix("sweep=") for word in words if word.startswith("sweep=")]
    if len(files) != 1:
        raise UserError("expected one sweep=FILE, e.g. sweep=sweeps/pairing.yaml")
    overrides = [word for word in words if not word.startswith("sweep=")]
    from semalign.sweep.file import load_sweep

    sweep = load_sweep(files[0], overrides)
    (plan if "--plan" in options else run)(sweep, yes="--yes" in options)
