"""What a sweep leaves for people: its MLflow runs, report, figures, and the best configuration."""

from __future__ import annotations

from pathlib import Path

from semalign.artifacts.local import Timer
from semalign.config.dotted import flat
from semalign.config.jobs import Config
from semalign.engine import recording
from semalign.engine.evaluation import Scored
from semalign.engine.tracking import Run, to_open
from semalign.files import write_text
from semalign.names import record_name
from semalign.report import comparison, table
from semalign.report import sweep as report
from semalign.sweep.summary import Summary
from semalign.sweep.trials import Trial, value_text


def finish_trial(run: Run, trial: Trial, folder: Path, scored: Scored, timer: Timer) -> None:
    """Scores, times, the adapter and the point of the sweep; then the trial's run is finished."""
    run.tags({f"axis.{name}": value_text(value) for name, value in trial.axes.items()})
    recording.record_result(run, trial.config, folder)
    recording.record_scores(run, scored, trial.config.evaluation)
    run.metrics({f"seconds/{name}": [value] for name, value in timer.seconds.items()})
    run.end("FINISHED")


def finish_sweep(run: Run, summary: Summary, folder: Path) -> None:
    """Report, figures and the best configuration, as files and in the sweep's run."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    compared = summary.sweep.compare is not None
    text = comparison.comparison_markdown(summary) if compared else report.sweep_markdown(summary)
    write_text(folder / "report.md", text)
    write_text(folder / "trials.csv", report.csv_text(summary))
    drawn = report.draw(summary) if summary.sweep.compare is None else {}
    for name, figure in drawn.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=150)
    sweep = summary.sweep
    run.params(
        {"sweep": sweep.name}
        | {f"base.{key}": value for key, value in flat(sweep.base).items()}
        | {f"axis.{axis.name}": str(axis) for axis in sweep.axes}
    )
    states = [result.state for result in summary.results]
    run.metrics({f"trials/{state}": [states.count(state)] for state in ("finished", "failed")})
    if (chosen := summary.chosen) is not None:
        write_text(folder / "best.yaml", report.best_yaml(chosen.trial))
        run.artifact(str(folder / "best.yaml"))
        for task, split in (chosen.metric, (chosen.metric[0], sweep.report.split)):
            scores = chosen.scores((task, split))
            run.metrics(
                {f"best/{record_name(split)}/{record_name(task)}": [sum(scores) / len(scores)]}
            )
        run.tags({"best": chosen.trial.label})
    for name in ("report.md", "trials.csv"):
        run.artifact(str(folder / name))
    run.artifact(str(folder / "figures"), "figures")
    run.end("FINISHED")


def show_sweep(summary: Summary, folder: Path, config: Config, run: Run) -> None:
    """The tables on the terminal, and where the rest is."""
    console = table.new_console()
    for title, rows in _tables(summary).items():
        console.print(table.terminal(title, *rows))
    compared = summary.sweep.compare is not None
    note = comparison.COMPARISON_NOTE if compared else report.SWEEP_NOTE
    console.print(note + report.limit_note(summary))
    console.print(f"report, figures, best configuration: {folder}")
    console.print(to_open(config, run))


def _tables(summary: Summary) -> dict[str, report.Rows]:
    sweep = summary.sweep
    if sweep.compare is not None:
        tables = comparison.Tables(summary)
        found = {
            sweep.name: tables.scores(),
            "against the control": tables.differences(),
            "costs": tables.costs(),
        }
    else:
        chosen = f"{sweep.name}, chosen (*) on {sweep.select.metric} {sweep.select.split}"
        found = {chosen: report.settings_table(summary)}
        if summary.chosen is not None:
            found[f"on {sweep.report.split}, once"] = report.chosen_table(summary)
    if (failures := report.failures_table(summary))[1]:
        found["failed"] = failures
    return found
