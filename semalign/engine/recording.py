"""What a run leaves for people: its MLflow run, report.md, and the table on the terminal."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from semalign.artifacts.artifact import Workspace
from semalign.artifacts.local import Timer
from semalign.config.jobs import Config, EvaluationJob
from semalign.config.sections import Evaluation
from semalign.core.attribution import critical_layers
from semalign.data.root import data_root
from semalign.engine.evaluation import Scored
from semalign.engine.tracking import Run, to_open
from semalign.files import write_json, write_text
from semalign.methods.method import Recipe, Transfer, used_settings
from semalign.names import record_name
from semalign.report import figures, table
from semalign.report.compare import by_group, line, own_metrics, paired
from semalign.stages.attribution import LayerScores
from semalign.stages.update import HISTORY
from semalign.tasks import split_source

TRANSFERRED = "transferred"
CANDIDATES = ("student", "teacher", TRANSFERRED)
_ENDS = ("stderr", "low", "high")  # of a score, recorded after its name


@dataclass(frozen=True)
class EpochRecorder:
    """Sends every epoch's steps and means to the run; waits, so that a kill loses no epoch.

    With `score` the result of every epoch but the last, as of then, is written into `folder`,
    scored, and the score returned: the last one's is that of the whole trial.
    """

    run: Run
    score: Callable[[Path], float] | None = None
    folder: Path | None = None
    last: int | None = None

    def __call__(self, measured: Any, keep: Callable[[Path], None]) -> float | None:
        steps = {f"train/{name}": values for name, values in measured.series.items()}
        if "cosine_loss" in measured.series:
            cosine = [1 - value for value in measured.series["cosine_loss"]]
            steps["train/alignment_cosine"] = cosine
        means = {f"epoch/{k}": [v] for k, v in measured.summary().items() if k != "epoch"}
        self.run.metrics(steps, first_step=measured.first_step + 1)
        self.run.metrics(means, first_step=measured.epoch)
        if self.score is None or measured.epoch == self.last:
            return None
        assert self.folder is not None
        served = self.folder / str(measured.epoch)  # where an engine on any node can read it
        keep(served)
        return self.score(served)


def start(run: Run, transfer: Transfer) -> None:
    """The settings that decide what comes out, resolved, and the data that they name."""
    config, inputs = transfer.config, transfer.inputs
    run.params(used_settings(config))
    root, data = data_root(config.data.root), config.data
    for split, context, rows in (
        (data.train_split, "training", inputs.train),
        (data.attribution_split, "attribution", inputs.attribution_teacher),
    ):
        source = split_source(root, data.task, split)
        run.dataset(f"{data.task}/{split}", rows.key, source, context, len(rows))


def describe(folder: Path, config: Config) -> None:
    """Write the effective configuration into a transfer's folder."""
    write_json(folder / "config.json", config.model_dump(mode="json"))


def write_scores(folder: Path, config: Config, scored: Scored) -> None:
    """Scores and where their records lie, as `semalign runs` and `compare` read them."""
    scores: dict[str, Any] = {}
    records: dict[str, Any] = {}
    for (name, task, split), score in scored.scores.items():
        found = {"value": score.value, "low": score.low, "high": score.high, "n": score.n}
        scores.setdefault(split, {}).setdefault(task, {})[name] = found
        place = str(scored.files[name, task, split])
        records.setdefault(split, {}).setdefault(task, {})[name] = place
    described = {
        "task": config.data.task,
        "method": config.method,
        "teacher": config.teacher,
        "student": config.student,
    }
    if config.evaluation.limited:
        described["scored"] = config.evaluation.limited
    write_json(folder / "scores.json", {**described, "scores": scores, "records": records})


def point_latest(folder: Path) -> None:
    """Let `latest`, next to the folder, point at it."""
    link = folder.with_name("latest")
    partial = folder.with_name(f".latest-{uuid.uuid4().hex}")
    partial.symlink_to(folder.name)
    partial.replace(link)


def finish(run: Run, transfer: Transfer, recipe: Recipe, scored: Scored, timer: Timer) -> None:
    """Figures, scores, per-item predictions, report and adapter; then the run is finished."""
    workspace = Workspace(transfer.config.work)
    folder = workspace.place(recipe.result)
    _draw(transfer, recipe, workspace)
    run.artifact(str(folder / "figures"), "figures")
    record_scores(run, scored, transfer.config.evaluation)
    run.metrics({f"seconds/{name}": [value] for name, value in timer.seconds.items()})
    run.tags({"vocabulary.overlap": f"{transfer.inputs.shared.fraction:.4f}"})
    record_result(run, transfer.config, folder)
    report = folder / "report.md"
    report.write_text(_markdown(transfer.config, scored), encoding="utf-8")
    run.artifact(str(report))
    run.table(_predictions(scored), "predictions.json")  # last: MLflow appends to a table
    run.end("FINISHED")


def record_result(run: Run, config: Config, folder: Path) -> None:
    """What the transfer left, and what that took. Of a whole student only the hash: the weights
    stay in the transfer's folder.
    """
    found = manifest(folder)
    run.tags({"method": config.method, "adapter.sha256": found["sha256"]})
    run.metrics(
        {
            f"cost/{name}": [float(found[name])]
            for name in ("trained_parameters", "seconds", "peak_bytes")
        }
    )
    if (adapter := folder / "adapter").exists():
        run.artifact(str(adapter), "adapter")


def finish_evaluation(run: Run, job: EvaluationJob, scored: Scored) -> None:
    """The same of an evaluation by itself."""
    record_scores(run, scored, job)
    report = job.work / "reports" / f"evaluation-{run.run_id}.md"
    write_text(report, _evaluation_markdown(job, scored))
    run.artifact(str(report))
    run.table(_predictions(scored), "predictions.json")  # last: MLflow appends to a table
    run.end("FINISHED")


def record_scores(run: Run, scored: Scored, settings: Evaluation) -> None:
    """Every score with its error and interval, those of groups, and how they were made.

    No metric's name is the folder of another's: a file store could not hold both. Names of groups,
    tasks and models become names that MLflow takes (see `record_name`).
    """
    metrics: dict[str, list[float]] = {}
    for (candidate, task, split), score in scored.scores.items():
        name = "/".join(map(record_name, (split, task, candidate)))
        metrics[name] = [score.value]
        for end in _ENDS:
            metrics[f"{name}.{end}"] = [getattr(score, end)]
        shares = scored.shares[candidate, task, split]
        for share, value in shares.items():
            metrics[f"{name}.{share}"] = [value]
        for own, value in own_metrics(task, scored.records[candidate, task, split]).items():
            metrics[f"{name}.{own}"] = [value]
        for group, part in by_group(scored.records[candidate, task, split]).items():
            metrics[f"{name}.{record_name(group, taken=(*_ENDS, *shares))}"] = [part.value]
    run.metrics(metrics)
    protocol = scored.protocol
    run.tags(
        {
            "protocol": f"{protocol.name}-{protocol.version}",
            "protocol.hash": protocol.hash,
            "sandbox.tier": sandbox_tier(scored),
            "scored": settings.limited or "all items",
        }
    )


def _draw(transfer: Transfer, recipe: Recipe, workspace: Workspace) -> None:
    folder, inputs = workspace.place(recipe.result), transfer.inputs
    history = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
    drawn = {"loss": figures.loss_curve(history)}
    for artifact in recipe.artifacts:
        if isinstance(artifact, LayerScores):
            scores, settings = artifact.read(workspace.place(artifact)), artifact.settings
            critical = critical_layers(scores, settings.top_n)
            drawn["attribution"] = figures.attribution(scores, critical, settings.granularity)
    if recipe.pairs:
        drawn["pairing"] = figures.pairing(
            recipe.pairs, inputs.teacher.layers, inputs.student.layers
        )
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=150)


def show(config: Config, scored: Scored, folder: Path, run: Run) -> None:
    """The table of each split, where the files are, and how to open MLflow."""
    console = table.new_console()
    for split in config.evaluation.splits:
        title = f"{config.teacher} -> {config.student}, {_split_text(config.evaluation, split)}"
        console.print(table.terminal(title, *_table(config, scored, split)))
        console.print(table.terminal(table.SHARES, *_shares(scored, split)))
    for text in table.joined_prompts(scored.shares):
        console.print(text)
    console.print("percent (95% interval); mean gap: points below the teacher; * trained on")
    console.print(f"protocol {table.protocol(scored.protocol)}")
    found = manifest(folder)
    console.print(
        f"method {config.method}: {found['trained_parameters']:,} trained parameters, "
        f"{found['seconds']:.1f} s, peak {found['peak_bytes'] / 1e9:.2f} GB a worker"
    )
    console.print(f"{found['result']} sha256: {found['sha256']}")
    console.print(f"{found['result']} and report: {folder}")
    console.print(to_open(config, run))


def show_evaluation(job: EvaluationJob, scored: Scored, run: Run) -> None:
    """The table of each split, the comparisons, and how to open MLflow."""
    console = table.new_console()
    for split in job.splits:
        which = _split_text(job, split)
        title = f"{job.model}, {which}, protocol {table.protocol(scored.protocol)}"
        console.print(table.terminal(title, *_evaluation_table(job, scored, split)))
        console.print(table.terminal(table.SHARES, *_shares(scored, split)))
    joined = table.joined_prompts(scored.shares)
    for text in (*joined, *_own_metrics(scored), *_comparisons(job, scored)):
        console.print(text)
    console.print("percent (95% interval)")
    rate = scored.generated / scored.seconds
    console.print(
        f"{scored.generated} items answered in {scored.seconds:.1f} s, {rate:.1f} items/s; "
        f"sandbox tier {sandbox_tier(scored)}"
    )
    console.print(to_open(job, run))


def _split_text(settings: Evaluation, split: str) -> str:
    """`test split`, or `test split, first 100 items`."""
    return f"{split} split" + (f", {settings.limited}" if settings.limited else "")


def sandbox_tier(scored: Scored) -> str:
    """The weakest tier that any program ran in; `none` when no code was run."""
    tiers = {r.tier for rows in scored.records.values() for r in rows if r.tier is not None}
    return str(max(tiers)) if tiers else "none"


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def _predictions(scored: Scored) -> pd.DataFrame:
    rows = [
        {"candidate": candidate, **asdict(record)}
        for (candidate, _task, _split), records in scored.records.items()
        for record in records
    ]
    return pd.DataFrame(rows).drop(columns=["tokens", "choice_scores", "seconds"])


def _table(config: Config, scored: Scored, split: str) -> tuple[list[str], list[list[str]]]:
    tasks = config.evaluation.tasks
    return (
        table.header(scored.scores, tasks, split, config.data.task),
        table.score_rows(scored.scores, CANDIDATES, tasks, split, "teacher"),
    )


def _shares(scored: Scored, split: str) -> tuple[list[str], list[list[str]]]:
    """What limits the scores of one split, as `_table` and `_evaluation_table` order them."""
    found = [key for key in scored.shares if key[2] == split]
    candidates, tasks = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    return [split, *tasks], table.share_rows(scored.shares, candidates, tasks, split)


def _evaluation_table(
    job: EvaluationJob, scored: Scored, split: str
) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(candidate for candidate, _, _ in scored.scores))
    return (
        table.header(scored.scores, job.tasks, split),
        table.score_rows(scored.scores, names, job.tasks, split),
    )


def _own_metrics(scored: Scored) -> list[str]:
    """One line for each score of a task of lm_eval: all its metrics."""
    lines = []
    for (candidate, task, split), records in scored.records.items():
        if found := own_metrics(task, records):
            values = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            lines.append(f"{task} {split}, {candidate}: {values}")
    return lines


def _comparisons(job: EvaluationJob, scored: Scored) -> list[str]:
    """One line a task and split: the first candidate against each of the others."""
    first, *others = dict.fromkeys(candidate for candidate, _, _ in scored.scores)
    return [
        f"{task} {split}, "
        + line(
            first,
            other,
            paired(
                scored.records[first, task, split],
                scored.records[other, task, split],
                k=scored.protocol.profile(task).k,
            ),
        )
        for other in others
        for split in job.splits
        for task in job.tasks
    ]


def _evaluation_markdown(job: EvaluationJob, scored: Scored) -> str:
    title = f"# {job.model}, protocol {table.protocol(scored.protocol)}"
    tables = [table.markdown(*_evaluation_table(job, scored, split)) for split in job.splits]
    lines = (*_own_metrics(scored), *_comparisons(job, scored))
    compared = "\n".join(f"- {text}" for text in lines)
    note = "Percent (95% interval)." + _limit_note(job)
    limits = _limits(scored, job.splits)
    return "\n\n".join([title, note, *tables, *limits, compared])


def _limit_note(settings: Evaluation) -> str:
    return f" Scored are the {settings.limited} of each split." if settings.limited else ""


def _limits(scored: Scored, splits: Sequence[str]) -> list[str]:
    """What limits the scores of a report, as paragraphs."""
    tables = [table.markdown(*_shares(scored, split)) for split in splits]
    joined = "\n".join(f"- {text}" for text in table.joined_prompts(scored.shares))
    return [f"{table.SHARES.capitalize()}.", *tables, *([joined] if joined else [])]


def _markdown(config: Config, scored: Scored) -> str:
    title = f"# {config.teacher} -> {config.student}, trained on {config.data.task}"
    note = (
        f"Protocol {table.protocol(scored.protocol)}. Percent (95% interval); mean gap: points "
        "below the teacher; * the task trained on." + _limit_note(config.evaluation)
    )
    splits = config.evaluation.splits
    tables = [table.markdown(*_table(config, scored, split)) for split in splits]
    return "\n\n".join([title, note, *tables, *_limits(scored, splits)])
