"""What a transfer leaves for people: its MLflow run, report.md, and the table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from semalign.config import Config
from semalign.core.attribution import critical_layers
from semalign.core.pairing import Pair
from semalign.engine.evaluation import Evaluation
from semalign.engine.steps import Steps
from semalign.engine.tracking import Run
from semalign.engine.training import HISTORY
from semalign.report import figures, table
from semalign.stages.data import data_root, fingerprint
from semalign.tasks import split_path

TRANSFERRED = "transferred"
NAMES = ("student", "teacher", TRANSFERRED)


def start(run: Run, steps: Steps) -> None:
    """The whole resolved configuration, and the data it names."""
    config = steps.config
    run.params(_flat(config.model_dump(mode="json")))
    root, data = data_root(config.data.root), config.data
    for split, context, tokens in (
        (data.train_split, "training", steps.inputs.train),
        (data.attribution_split, "attribution", steps.inputs.attribution_teacher),
    ):
        source = str(split_path(root, data.task, split))
        run.dataset(f"{data.task}/{split}", fingerprint(tokens), source, context, len(tokens))


def finish(
    run: Run,
    steps: Steps,
    scores: Sequence[float],
    pairs: Sequence[Pair],
    folder: Path,
    evaluation: Evaluation,
) -> None:
    """Figures, scores, per-item predictions, report and adapter; then the run is finished."""
    config, inputs = steps.config, steps.inputs
    _draw(steps, scores, pairs, folder)
    run.artifact(str(folder / "figures"), "figures")
    run.metrics(
        {
            f"{split}/{task}/{candidate}": [score.value]
            for (candidate, task, split), score in evaluation.scores.items()
        }
    )
    run.metrics({f"seconds/{name}": [value] for name, value in steps.seconds.items()})
    run.tags(
        {
            "sandbox.tier": sandbox_tier(evaluation),
            "vocabulary.overlap": f"{inputs.overlap.fraction:.4f}",
            "adapter.sha256": _manifest(folder)["sha256"],
        }
    )
    report = folder / "report.md"
    report.write_text(_markdown(config, evaluation), encoding="utf-8")
    run.artifact(str(report))
    run.artifact(str(folder / "adapter"), "adapter")
    run.table(_predictions(evaluation), "predictions.json")  # last: MLflow appends to a table
    run.end("FINISHED")


def _draw(steps: Steps, scores: Sequence[float], pairs: Sequence[Pair], folder: Path) -> None:
    attribution, inputs = steps.config.attribution, steps.inputs
    critical = critical_layers(list(scores), attribution.top_n)
    layers = inputs.teacher.num_hidden_layers, inputs.student.num_hidden_layers
    history = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in (
        ("attribution", figures.attribution(scores, critical, attribution.granularity)),
        ("pairing", figures.pairing(pairs, *layers)),
        ("loss", figures.loss_curve(history)),
    ):
        figure.savefig(folder / "figures" / f"{name}.png", dpi=150)


def show(config: Config, evaluation: Evaluation, folder: Path, run_id: str) -> None:
    """The table of each split, where the files are, and how to open MLflow."""
    console = Console(soft_wrap=True)
    for split in config.evaluation.splits:
        title = f"{config.teacher} -> {config.student}, {split} split"
        console.print(table.terminal(title, *_table(config, evaluation, split)))
    console.print("percent (95% interval); mean gap: points below the teacher; * trained on")
    console.print(f"adapter sha256: {_manifest(folder)['sha256']}")
    console.print(f"adapter and report: {folder}")
    console.print(f"MLflow run {run_id}; to open it:")
    console.print(f"  mlflow ui --host 127.0.0.1 --backend-store-uri {config.tracking_uri}")


def sandbox_tier(evaluation: Evaluation) -> str:
    """The weakest tier that any program ran in; `none` when no code was run."""
    tiers = {r.tier for rows in evaluation.records.values() for r in rows if r.tier is not None}
    return str(max(tiers)) if tiers else "none"


def _manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def _predictions(evaluation: Evaluation) -> pd.DataFrame:
    rows = [
        {"candidate": candidate, **asdict(record)}
        for (candidate, _task, _split), records in evaluation.records.items()
        for record in records
    ]
    return pd.DataFrame(rows).drop(columns=["tokens", "seconds"])


def _table(config: Config, evaluation: Evaluation, split: str) -> tuple[list[str], list[list[str]]]:
    tasks = config.evaluation.tasks
    return (
        table.header(evaluation.scores, tasks, split, config.data.task),
        table.rows(evaluation.scores, NAMES, tasks, split, "teacher"),
    )


def _markdown(config: Config, evaluation: Evaluation) -> str:
    title = f"# {config.teacher} -> {config.student}, trained on {config.data.task}"
    note = "Percent (95% interval); mean gap: points below the teacher; * the task trained on."
    splits = config.evaluation.splits
    tables = [table.markdown(*_table(config, evaluation, split)) for split in splits]
    return "\n\n".join([title, note, *tables])


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
