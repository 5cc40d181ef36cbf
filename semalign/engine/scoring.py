"""Models and adapters scored by the evaluation settings, in a transfer or as a job of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semalign.artifacts import records
from semalign.artifacts.files import content_key
from semalign.config.dotted import flat
from semalign.config.jobs import Config, EvaluationJob
from semalign.config.sections import Evaluation as Settings
from semalign.data.root import data_root
from semalign.engine import recording
from semalign.engine.cluster import check_resources, cluster_resources, connect
from semalign.engine.evaluation import Candidate, Evaluation, check, evaluate
from semalign.engine.generation import EngineShape
from semalign.engine.tracking import recorded
from semalign.models.fingerprints import model_fingerprint
from semalign.models.loading import load_config
from semalign.models.peft_folder import adapter_fingerprint
from semalign.stages.inputs import check_writable
from semalign.stages.scoring import SandboxLimits, chosen_protocol
from semalign.tasks import load_split

_SHAPE = (
    "num_engines",
    "num_cpus",
    "num_gpus",
    "tensor_parallel_size",
    "max_model_len",
    "kv_cache_gb",
    "max_restarts",
    "batch_items",
)


def engine_shape(settings: Settings, dtype: str, trust_remote_code: bool) -> EngineShape:
    """What the settings ask of each engine."""
    given = settings.model_dump(include=set(_SHAPE))
    return EngineShape(dtype=dtype, trust_remote_code=trust_remote_code, **given)


def score_candidates(
    config: Config,
    candidates: Sequence[Candidate],
    engines: Mapping[str, Sequence[Any]] | None = None,
    judge_cpus: float = 1,
) -> Evaluation:
    """Score any models and adapters by a transfer's evaluation settings.

    ``engines`` that run already, by model, are used and left running. Who calls from a process
    that holds CPUs of Ray's must not wait for others: ``judge_cpus=0``.
    """
    return _score(
        config.evaluation,
        candidates,
        root=config.evaluation.root or config.data.root,
        work=config.work,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        engines=engines,
        judge_cpus=judge_cpus,
    )


def run_evaluation(job: EvaluationJob) -> Evaluation:
    """Score the model, or adapters of it, print the table and record it all in MLflow.

    Items that have their records are not asked again. Raises UserError for bad input.
    """
    candidates, key = _checked(job)
    check_writable(job.work)
    with connect(job.cluster.address):
        check_resources(job, cluster_resources())
        with recorded(job, key=key, name=f"evaluate-{job.protocol}") as run:
            finished = run.is_finished()
            if not finished:
                run.params(flat(job.model_dump(mode="json")))
            evaluation = score_job(job, candidates, job.work)
            if not finished:
                recording.finish_evaluation(run, job, evaluation)
        recording.show_evaluation(job, evaluation, run)
    return evaluation


def score_job(job: EvaluationJob, candidates: Sequence[Candidate], work: Path) -> Evaluation:
    """Score any models and adapters by an evaluation's settings; needs a running Ray."""
    return _score(
        job,
        candidates,
        root=str(job.root),
        work=work,
        dtype=job.dtype,
        trust_remote_code=job.trust_remote_code,
    )


def show_evaluation_plan(job: EvaluationJob) -> None:
    """Print what would be asked of which engines; loads no weights."""
    candidates, _ = _checked(job)
    protocol = chosen_protocol(job)
    print(f"protocol {protocol.name}, version {protocol.version}, hash {protocol.hash[:12]}")
    for task in job.tasks:
        profile = protocol.profile(task)
        for split in job.splits:
            items = len(load_split(data_root(str(job.root)), task, split))
            print(f"{task} {split}: {items} items x {profile.n} samples x {len(candidates)} models")
    print(
        f"{job.num_engines} engine(s) of {job.num_cpus:g} CPUs and "
        f"{job.num_gpus * job.tensor_parallel_size:g} GPUs each"
    )


def _checked(job: EvaluationJob) -> tuple[list[Candidate], str]:
    """The models to score and the key of their MLflow run, once everything is known to be there."""
    protocol = chosen_protocol(job)
    load_config(job.model, trust_remote_code=job.trust_remote_code)
    candidates = _candidates(job)
    check(candidates, job.tasks, protocol, _limits(job), trust_remote_code=job.trust_remote_code)
    data = [
        records.content_key(load_split(data_root(str(job.root)), task, split), split)
        for task in job.tasks
        for split in job.splits
    ]
    described = job.model_dump(
        mode="json", exclude={"cluster", "tracking", "workdir", "model", "adapter"}
    )
    prints = [model_fingerprint(job.model), *map(adapter_fingerprint, job.adapters)]
    return candidates, content_key([*prints, *data, protocol.hash], described)


def _candidates(job: EvaluationJob) -> list[Candidate]:
    model = Candidate(name=Path(job.model).name, model=job.model)
    adapted = [
        Candidate(name=name, model=job.model, adapter=folder)
        for name, folder in zip(_names(job.adapters), job.adapters, strict=True)
    ]
    return [model, *adapted] if job.baseline or not adapted else adapted


def _names(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for length in range(1, 1 + max((len(Path(folder).parts) for folder in folders), default=0)):
        names = ["/".join(Path(folder).parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return list(folders)


def _limits(settings: Settings) -> SandboxLimits:
    return SandboxLimits(min_tier=settings.sandbox.min_tier, workers=settings.sandbox.num_workers)


def _score(
    settings: Settings,
    candidates: Sequence[Candidate],
    *,
    root: str,
    work: Path,
    dtype: str,
    trust_remote_code: bool,
    engines: Mapping[str, Sequence[Any]] | None = None,
    judge_cpus: float = 1,
) -> Evaluation:
    return evaluate(
        candidates,
        tasks=settings.tasks,
        splits=settings.splits,
        root=data_root(root),
        folder=work / "evaluations",
        shape=engine_shape(settings, dtype, trust_remote_code),
        sandbox=dataclasses.replace(_limits(settings), num_cpus=judge_cpus),
        protocol=chosen_protocol(settings),
        engines=engines,
    )
