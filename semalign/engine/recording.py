"""What a run leaves for people: its MLflow run, report.md, and the table on the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from semalign.config.jobs import Config, EvaluationJob
from semalign.core.attribution import critical_layers
from semalign.data.root import data_root
from semalign.data.tokens import fingerprint
from semalign.engine.evaluation import Evaluation
from semalign.engine.methods import Made
from semalign.engine.steps import Steps
from semalign.engine.tracking import Run, to_open
from semalign.engine.training import HISTORY
from semalign.report import figures, table
from semalign.report.compare import by_group, line, paired
from semalign.sweep.axes import flat
from semalign.tasks import split_source

TRANSFERRED = "transferred"
NAMES = ("student", "teacher", TRANSFERRED)


def start(run: Run, steps: Steps) -> None:
    """The whole resolved configuration, and the data it names."""
    config = steps.config
    run.params(flat(config.model_dump(mode="json")))
    root, data = data_root(config.data.root), config.data
    for split, context, tokens in (
        (data.train_split, "training", steps.inputs.train),
        (data.attribution_split, "attribution", steps.inputs.attribution_teacher),
    ):
        source = split_source(root, data.task, split)
        run.dataset(f"{data.task}/{split}", fingerprint(tokens), source, context, len(tokens))


def finish(run: Run, steps: Steps, made: Made, evaluation: Evaluation) -> None:
    """Figures, scores, per-item predictions, report and adapter; then the run is finished."""
    config, inputs, folder = steps.config, steps.inputs, made.folder
    _draw(steps, made)
    run.artifact(str(folder / "figures"), "figures")
    record_scores(run, evaluation)
    run.metrics({f"seconds/{name}": [value] for name, value in steps.seconds.items()})
    run.tags({"vocabulary.overlap": f"{inputs.overlap.fraction:.4f}"})
    record_result(run, folder)
    report = folder / "report.md"
    report.write_text(_markdown(config, evaluation), encoding="utf-8")
    run.artifact(str(report))
    run.table(_predictions(evaluation), "predictions.json")  # last: MLflow appends to a table
    run.end("FINISHED")


def record_result(run: Run, folder: Path) -> None:
    """What the transfer left, and what that took. Of a whole student only the hash: the weights
    stay in the transfer's folder.
    """
    found = manifest(folder)
    run.tags({"method": found["method"], "adapter.sha256": found["sha256"]})
    run.metrics(
        {
            f"cost/{name}": [float(found[name])]
            for name in ("trained_parameters", "seconds", "peak_bytes")
        }
    )
    if (adapter := folder / "adapter").exists():
        run.artifact(str(adapter), "adapter")


def finish_evaluation(run: Run, job: EvaluationJob, evaluation: Evaluation) -> None:
    """The same of an evaluation by itself."""
    record_scores(run, evaluation)
    job.work.mkdir(parents=True, exist_ok=True)
    report = job.work / "evaluations" / f"report-{run.run_id}.md"
    report.write_text(_evaluation_markdown(job, evaluation), encoding="utf-8")
    run.artifact(str(report))
    run.table(_predictions(evaluation), "predictions.json")  # last: MLflow appends to a table
    run.end("FINISHED")


def record_scores(run: Run, evaluation: Evaluation) -> None:
    """Every score with its error and interval, those of groups, and how they were made.

    No metric's name is the folder of another's: a file store could not hold both.
    """
    metrics: dict[str, list[float]] = {}
    for (candidate, task, split), score in evaluation.scores.items():
        name = f"{split}/{task}/{candidate}"
        metrics[name] = [score.value]
        for end in ("stderr", "low", "high"):
            metrics[f"{name}.{end}"] = [getattr(score, end)]
        for group, part in by_group(evaluation.records[candidate, task, split]).items():
            metrics[f"{name}.{group}"] = [part.value]
    run.metrics(metrics)
    protocol = evaluation.protocol
    run.tags(
        {
            "protocol": f"{protocol.name}-{protocol.version}",
            "protocol.hash": protocol.hash,
            "sandbox.tier": sandbox_tier(evaluation),
        }
    )


def _draw(steps: Steps, made: Made) -> None:
    attribution, inputs, folder = steps.config.attribution, steps.inputs, made.folder
    layers = inputs.teacher.num_hidden_layers, inputs.student.num_hidden_layers
    history = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    drawn = {"loss": figures.loss_curve(history)}
    if made.pairs:
        critical = critical_layers(list(made.scores), attribution.top_n)
        drawn["attribution"] = figures.attribution(made.scores, critical, attribution.granularity)
        drawn["pairing"] = figures.pairing(made.pairs, *layers)
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=150)


def show(config: Config, evaluation: Evaluation, folder: Path, run: Run) -> None:
    """The table of each split, where the files are, and how to open MLflow."""
    console = table.new_console()
    for split in config.evaluation.splits:
        title = f"{config.teacher} -> {config.student}, {split} split"
        console.print(table.terminal(title, *_table(config, evaluation, split)))
    console.print("percent (95% interval); mean gap: points below the teacher; * trained on")
    console.print(f"protocol {table.protocol(evaluation.protocol)}")
    found = manifest(folder)
    console.print(
        f"method {found['method']}: {found['trained_parameters']:,} trained parameters, "
        f"{found['seconds']:.1f} s, peak {found['peak_bytes'] / 1e9:.2f} GB a worker"
    )
    console.print(f"{found['result']} sha256: {found['sha256']}")
    console.print(f"{found['result']} and report: {folder}")
    console.print(to_open(config, run))


def show_evaluation(job: EvaluationJob, evaluation: Evaluation, run: Run) -> None:
    """The table of each split, the comparisons, and how to open MLflow."""
    console = table.new_console()
    for split in job.splits:
        title = f"{job.model}, {split} split, protocol {table.protocol(evaluation.protocol)}"
        console.print(table.terminal(title, *_evaluation_table(job, evaluation, split)))
    for text in _comparisons(job, evaluation):
        console.print(text)
    console.print("percent (95% interval)")
    rate = evaluation.generated / evaluation.seconds
    console.print(
        f"{evaluation.generated} items answered in {evaluation.seconds:.1f} s, {rate:.1f} items/s; "
        f"sandbox tier {sandbox_tier(evaluation)}"
    )
    console.print(to_open(job, run))


def sandbox_tier(evaluation: Evaluation) -> str:
    """The weakest tier that any program ran in; `none` when no code was run."""
    tiers = {r.tier for rows in evaluation.records.values() for r in rows if r.tier is not None}
    return str(max(tiers)) if tiers else "none"


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def _predictions(evaluation: Evaluation) -> pd.DataFrame:
    rows = [
        {"candidate": candidate, **asdict(record)}
        for (candidate, _task, _split), records in evaluation.records.items()
        for record in records
    ]
    return pd.DataFrame(rows).drop(columns=["tokens", "choice_scores", "seconds"])


def _table(config: Config, evaluation: Evaluation, split: str) -> tuple[list[str], list[list[str]]]:
    tasks = config.evaluation.tasks
    return (
        table.header(evaluation.scores, tasks, split, config.data.task),
        table.score_rows(evaluation.scores, NAMES, tasks, split, "teacher"),
    )


def _evaluation_table(
    job: EvaluationJob, evaluation: Evaluation, split: str
) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(candidate for candidate, _, _ in evaluation.scores))
    return (
        table.header(evaluation.scores, job.tasks, split),
        table.score_rows(evaluation.scores, names, job.tasks, split),
    )


def _comparisons(job: EvaluationJob, evaluation: Evaluation) -> list[str]:
    """One line a task and split: the first candidate against each of the others."""
    first, *others = dict.fromkeys(candidate for candidate, _, _ in evaluation.scores)
    return [
        f"{task} {split}, "
        + line(
            first,
            other,
            paired(
                evaluation.records[first, task, split],
                evaluation.records[other, task, split],
                k=evaluation.protocol.profile(task).k,
            ),
        )
        for other in others
        for split in job.splits
        for task in job.tasks
    ]


def _evaluation_markdown(job: EvaluationJob, evaluation: Evaluation) -> str:
    title = f"# {job.model}, protocol {table.protocol(evaluation.protocol)}"
    tables = [table.markdown(*_evaluation_table(job, evaluation, split)) for split in job.splits]
    compared = "\n".join(f"- {text}" for text in _comparisons(job, evaluation))
    return "\n\n".join([title, "Percent (95% interval).", *tables, compared])


def _markdown(config: Config, evaluation: Evaluation) -> str:
    title = f"# {config.teacher} -> {config.student}, trained on {config.data.task}"
    note = (
        f"Protocol {table.protocol(evaluation.protocol)}. Percent (95% interval); mean gap: points "
        "below the teacher; * the task trained on."
    )
    splits = config.evaluation.splits
    tables = [table.markdown(*_table(config, evaluation, split)) for split in splits]
    return "\n\n".join([title, note, *tables])
