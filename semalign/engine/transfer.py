"""One transfer, end to end: the steps, then evaluation, the MLflow run and the final table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from semalign.artifacts.files import content_key
from semalign.config.jobs import Config
from semalign.engine import recording
from semalign.engine.cluster import check_resources, cluster_resources, connect
from semalign.engine.evaluation import Candidate, Evaluation
from semalign.engine.methods import make
from semalign.engine.recording import TRANSFERRED
from semalign.engine.scoring import score_candidates
from semalign.engine.steps import Steps
from semalign.engine.tracking import recorded
from semalign.models.heads import find_lm_head
from semalign.stages.inputs import check_writable, load_inputs


@dataclass(frozen=True)
class Outcome:
    """What a transfer leaves: its folder, its MLflow run, and its scores."""

    folder: Path
    run_id: str
    evaluation: Evaluation


def transfer(config: Config) -> Outcome:
    """Run, or finish, the transfer that the configuration describes, and print its table.

    A finished transfer is not run again: every step finds its files, and its MLflow run is left
    as it is. Raises UserError for bad input, and Diverged when the loss is no longer finite.
    """
    inputs = load_inputs(config)
    for path in (config.teacher, config.student):
        find_lm_head(path, trust_remote_code=config.trust_remote_code)
    check_writable(config.work)
    with connect(config.cluster.address):
        check_resources(config, cluster_resources())
        return _run(Steps(config, inputs))


def _run(steps: Steps) -> Outcome:
    config = steps.config
    described = config.model_dump(mode="json", exclude={"cluster", "tracking", "workdir"})
    key = content_key(steps.prints, described)
    with recorded(config, key=key, name=run_name(config)) as run:
        finished = run.is_finished()
        if not finished:
            recording.start(run, steps)
        made = make(steps, run)
        folder = made.folder
        with steps.stage("evaluate") as notes:
            evaluation = score(config, folder)
            notes.append(f"{evaluation.generated} items generated")
            notes.append(f"sandbox tier {recording.sandbox_tier(evaluation)}")
        if not finished:
            with steps.stage("record") as notes:
                recording.finish(run, steps, made, evaluation)
                notes.append(f"MLflow run {run.run_id}")
    recording.show(config, evaluation, folder, run)
    return Outcome(folder, run.run_id, evaluation)


def run_name(config: Config) -> str:
    """What is trained on, and how."""
    how = config.pairing.strategy if config.method == "semalign" else config.method
    return f"{config.data.task}-{how}"


def score(config: Config, folder: Path) -> Evaluation:
    """Score the student, the teacher and the transferred student."""
    base = [
        Candidate(name="student", model=config.student),
        Candidate(name="teacher", model=config.teacher),
    ]
    return score_candidates(config, [*base, transferred(config, folder)])


def transferred(config: Config, folder: Path) -> Candidate:
    """What a transfer left in its folder, to be scored: an adapter, or a whole student.

    LaTen's deltas are so small that only float32 keeps them.
    """
    if (student := folder / "student").exists():
        dtype = "float32" if config.method == "laten" else None
        return Candidate(name=TRANSFERRED, model=str(student), dtype=dtype)
    return Candidate(name=TRANSFERRED, model=config.student, adapter=str(folder / "adapter"))
