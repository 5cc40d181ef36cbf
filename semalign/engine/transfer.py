"""One transfer, end to end: the steps, then evaluation, the MLflow run and the final table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from semalign.config import Config
from semalign.core.attribution import critical_layers
from semalign.core.pairing import Pair
from semalign.engine.cluster import check_resources, cluster_resources, connect
from semalign.engine.evaluation import Candidate, evaluate
from semalign.engine.steps import Steps
from semalign.engine.tracking import Run, start_tracker
from semalign.engine.training import HISTORY
from semalign.report import figures, table
from semalign.stages.data import data_root, fingerprint
from semalign.stages.inputs import Inputs, check_writable, content_key, load_inputs
from semalign.tasks import split_path
from semalign.tasks.scores import Score

TRANSFERRED = "transferred"


@dataclass(frozen=True)
class Outcome:
    """What a transfer leaves: its folder, MLflow run, and score by (candidate, task, split)."""

    folder: Path
    run_id: str
    scores: dict[tuple[str, str, str], Score]


def transfer(config: Config) -> Outcome:
    """Run, or finish, the transfer that the configuration describes.

    Raises UserError for bad input, and stages.train.Diverged when the loss is no longer finite.
    """
    inputs = load_inputs(config)
    check_writable(config.work)
    with connect(config.cluster.address):
        check_resources(config, cluster_resources())
        return _run(Steps(config, inputs))


def _run(steps: Steps) -> Outcome:
    config = steps.config
    name = config.tracking.run_name or f"{config.data.task}-{config.pairing.strategy}"
    run = start_tracker(
        config.tracking_uri,
        config.tracking.experiment,
        key=content_key(
            steps.prints, config.model_dump(mode="json", exclude={"cluster", "tracking"})
        ),
        name=name,
        artifacts=str(config.work / "mlartifacts"),
    )
    try:
        run.params(_flat(config.model_dump(mode="json")))
        _record_data(run, config, steps.inputs)
        scores = steps.attribute()
        pairs = steps.pair(scores)
        stores = steps.extract(pairs)
        transport = steps.align()
        folder = steps.train(pairs, stores, transport, run.actor)
        with steps.stage("evaluate") as notes:
            results, records, tier = _evaluate(config, folder)
            notes.append(f"{len(records)} items, sandbox tier {tier}")
        with steps.stage("record") as notes:
            _record(run, steps, scores, pairs, folder, results, records, tier)
            notes.append(f"MLflow run {run.run_id}")
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish()
    _print(config, results, folder, run.run_id)
    return Outcome(folder, run.run_id, results)


def _evaluate(config: Config, folder: Path) -> tuple[dict[tuple[str, str, str], Score], Any, int]:
    """Scores, per-item records and the sandbox tier of student, teacher and transferred student."""
    full = config.training.adapter == "full"
    candidates = [
        Candidate("student", config.student),
        Candidate("teacher", config.teacher),
        Candidate(TRANSFERRED, str(folder / "student"))
        if full
        else Candidate(TRANSFERRED, config.student, str(folder / "adapter")),
    ]
    found = evaluate(
        candidates,
        config.evaluation,
        data_root(config.evaluation.root or config.data.root),
        config.work / "evaluations",
        dtype=config.dtype,
    )
    return found.scores, found.records, found.tier


def _record_data(run: Run, config: Config, inputs: Inputs) -> None:
    root = data_root(config.data.root)
    data = config.data
    for split, context, tokens in (
        (data.train_split, "training", inputs.train),
        (data.attribution_split, "attribution", inputs.attribution_teacher),
    ):
        source = str(split_path(root, data.task, split))
        run.dataset(f"{data.task}/{split}", fingerprint(tokens), source, context, len(tokens))


def _record(
    run: Run,
    steps: Steps,
    scores: list[float],
    pairs: tuple[Pair, ...],
    folder: Path,
    results: dict[tuple[str, str, str], Score],
    records: Any,
    tier: int,
) -> None:
    """Figures, scores, per-item predictions, the table and the adapter, to MLflow."""
    config, inputs = steps.config, steps.inputs
    critical = critical_layers(scores, config.attribution.top_n)
    run.figure(
        figures.attribution(scores, critical, config.attribution.granularity),
        "figures/attribution.png",
    )
    layers = inputs.teacher.num_hidden_layers, inputs.student.num_hidden_layers
    run.figure(figures.pairing(pairs, *layers), "figures/pairing.png")
    history = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    run.figure(figures.loss_curve(history), "figures/loss.png")
    for (candidate, task, split), score in results.items():
        run.metrics({f"{split}/{task}/{candidate}": [score.value]})
    run.metrics({f"seconds/{name}": [value] for name, value in steps.seconds.items()})
    run.tags({"sandbox.tier": str(tier), "vocabulary.overlap": f"{inputs.overlap.fraction:.4f}"})
    run.table(records, "predictions.json")
    report = folder / "report.md"
    report.write_text(_markdown(config, results), encoding="utf-8")
    run.artifact(str(report))
    run.artifact(str(folder / "adapter"), "adapter")


def _table(
    config: Config, results: dict[tuple[str, str, str], Score], split: str
) -> tuple[list[str], list[list[str]]]:
    tasks = config.evaluation.tasks
    names = ("student", "teacher", TRANSFERRED)
    return (
        table.header(results, "student", tasks, split, config.data.task),
        table.rows(results, names, tasks, split, "teacher"),
    )


def _markdown(config: Config, results: dict[tuple[str, str, str], Score]) -> str:
    parts = [table.markdown(*_table(config, results, s)) for s in config.evaluation.splits]
    return f"# {config.teacher} -> {config.student}, trained on {config.data.task}\n\n" + "\n".join(
        parts
    )


def _print(
    config: Config, results: dict[tuple[str, str, str], Score], folder: Path, run_id: str
) -> None:
    console = Console()
    for split in config.evaluation.splits:
        head, body = _table(config, results, split)
        title = (
            f"{config.teacher} -> {config.student} ({split}; percent, 95% interval; * trained on)"
        )
        console.print(table.terminal(title, head, body))
    console.print(f"adapter and report: {folder}", soft_wrap=True)
    console.print(f"MLflow run {run_id}; open it with:", soft_wrap=True)
    console.print(
        f"  mlflow ui --host 127.0.0.1 --backend-store-uri {config.tracking_uri}", soft_wrap=True
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
