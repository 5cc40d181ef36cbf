"""Models and adapters scored by the evaluation settings, in a transfer or as a job of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semalign.artifacts.artifact import Workspace
from semalign.config.describe import runtime_settings
from semalign.config.dotted import flat
from semalign.config.jobs import Config, EvaluationJob
from semalign.data.root import data_root
from semalign.engine import recording
from semalign.engine.evaluation import Scored, check, score_all, wanted_records
from semalign.engine.limits import check_context
from semalign.engine.tracking import recorded
from semalign.errors import UserError
from semalign.files import bytes_text, check_writable, content_key, naming_full_disk
from semalign.methods.method import Transfer
from semalign.models.peft_folder import adapter_rank
from semalign.models.reference import Model
from semalign.models.speed import duration_text, operations_per_second
from semalign.plan import TIME_NOTE, engine_step
from semalign.plugins import load_plugins
from semalign.stages.judged import Candidate, Served
from semalign.stages.scoring import chosen_protocol

if TYPE_CHECKING:  # Ray, which a local run needs not have
    from semalign.engine.serving import Engines


def score_candidates(
    config: Config,
    candidates: Sequence[Candidate],
    engines: Mapping[Served, Sequence[Any]] | None = None,
    *,
    judge_cpus: float = 1,
    local: bool = False,
) -> Scored:
    """Score any models and adapters by a transfer's evaluation settings (see `evaluate`)."""
    return score_all(
        candidates,
        config.evaluation,
        root=data_root(config.evaluation.root or config.data.root),
        workspace=Workspace(config.work),
        engines=engines,
        judge_cpus=judge_cpus,
        local=local,
    )


def base_candidates(transfer: Transfer) -> list[Candidate]:
    """The models that a transferred student is set against."""
    inputs = transfer.inputs
    return [
        Candidate(name="student", model=inputs.student),
        Candidate(name="teacher", model=inputs.teacher),
    ]


def transferred(transfer: Transfer, folder: Path) -> Candidate:
    """What a transfer left in its folder, to be scored: an adapter, or a whole student."""
    config = transfer.config
    if (student := folder / "student").exists():
        dtype = transfer.method.dtype(config)
        model = open_model(config, str(student), dtype=dtype)
        return Candidate(name=recording.TRANSFERRED, model=model)
    adapter = str(folder / "adapter")
    return Candidate(name=recording.TRANSFERRED, model=transfer.inputs.student, adapter=adapter)


def open_model(
    job: Config | EvaluationJob, path: str, *, dtype: str | None = None, planned: bool = False
) -> Model:
    """A model by reference, its hashes kept in the work folder (see `Model.open`)."""
    return Model.open(
        path,
        dtype=dtype or job.dtype,
        trust_remote_code=job.trust_remote_code,
        cache=job.work / "fingerprints",
        planned=planned,
    )


def run_evaluation(
    job: EvaluationJob, *, local: bool = False, engines: Engines | None = None
) -> Scored:
    """Score the model, or adapters of it, print the table and record it all in MLflow.

    Items that have their records are not answered again. `local`: without Ray. `engines` that run
    already are used and left running. Raises UserError for bad input.
    """
    candidates = checked_candidates(job)
    check_writable(job.work)
    with contextlib.ExitStack() as stack:
        stack.enter_context(naming_full_disk(job.work, lambda: 0))
        if not local:
            from semalign.engine.cluster import check_resources, cluster_resources, connect

            stack.enter_context(connect(job.cluster.address))
            check_resources(job, cluster_resources())
        name = f"evaluate-{job.protocol}"
        key = evaluation_key(job, candidates)
        run = stack.enter_context(recorded(job, key=key, name=name, local=local))
        finished = run.is_finished()
        if not finished:
            run.params(flat(job.model_dump(mode="json")))
        if engines is not None:
            ranks = [adapter_rank(c.adapter) for c in candidates if c.adapter]
            engines.start(candidates[0].model, job, ranks)
        running = engines.running if engines else None
        scored = score_job(job, candidates, job.work, running, local=local)
        if not finished:
            recording.finish_evaluation(run, job, scored)
        recording.show_evaluation(job, scored, run)
    return scored


def score_job(
    job: EvaluationJob,
    candidates: Sequence[Candidate],
    work: Path,
    engines: Mapping[Served, Sequence[Any]] | None = None,
    *,
    local: bool = False,
) -> Scored:
    """Score any models and adapters by an evaluation's settings; needs a running Ray, unless
    `local`.
    """
    root, workspace = data_root(str(job.root)), Workspace(work)
    return score_all(candidates, job, root=root, workspace=workspace, engines=engines, local=local)


def show_evaluation_plan(job: EvaluationJob) -> None:
    """Print what would be requested of which engines; loads no weights."""
    candidates = checked_candidates(job)
    protocol = chosen_protocol(job)
    print(f"protocol {protocol.name}, version {protocol.version}, hash {protocol.hash[:12]}")
    workspace, steps = Workspace(job.work), []
    for (name, task, split), records in wanted_records(
        candidates, job, data_root(str(job.root))
    ).items():
        requested = records.requests()
        check_context(requested, f"{task} {split}", records.context_length)
        step = engine_step(job, records, cached=workspace.has(records))
        steps.append(step)
        rate = operations_per_second(
            job.dtype, records.candidate.model.width, "cuda" if step.gpus else "cpu"
        )
        cut = sum(request.truncated for request in requested)
        print(
            f"{name}, {task} {split}: {len(requested)} items x {protocol.profile(task).n} samples"
            + (f", {job.limited}" if job.limited else "")
            + (f", {cut} prompts cut" if cut else "")
            + (", cached" if step.cached else f", ~ {duration_text(step.seconds(rate))}")
        )
    memory = max(step.memory for step in steps)
    print(
        f"{job.num_engines} engine(s) of {job.num_cpus:g} CPUs and "
        f"{job.num_gpus * job.tensor_parallel_size:g} GPUs each, with about {bytes_text(memory)} "
        "of memory"
    )
    print("answers are taken to be as long as the references")
    print(TIME_NOTE)


def checked_candidates(job: EvaluationJob) -> list[Candidate]:
    """The models to score, once everything is known to be there."""
    load_plugins(job.plugins)
    if job.limit is None and job.limit_seed is not None:
        raise UserError(f"limit_seed={job.limit_seed}: has no effect with limit=null; leave it out")
    candidates = _candidates(job, planned=True)
    root = data_root(str(job.root))
    wanted_records(candidates, job, root)
    check(candidates, job, root=root, work=job.work)
    return _candidates(job, planned=False)  # last, for all weights are read to hash them


def _candidates(job: EvaluationJob, *, planned: bool) -> list[Candidate]:
    model = open_model(job, job.model, planned=planned)
    base = Candidate(name=Path(job.model).name, model=model)
    adapted = [
        Candidate(name=name, model=model, adapter=folder)
        for name, folder in zip(_names(job.adapters), job.adapters, strict=True)
    ]
    return [base, *adapted] if job.baseline or not adapted else adapted


def evaluation_key(job: EvaluationJob, candidates: Sequence[Candidate]) -> str:
    """Names the MLflow run: all records that it scores, and how they are scored."""
    runtime = runtime_settings(EvaluationJob)
    settings = flat(job.model_dump(mode="json", exclude={"model", "adapter", "root"}))
    used = {name: value for name, value in settings.items() if name not in runtime}
    wanted = wanted_records(candidates, job, data_root(str(job.root)))
    return content_key("evaluation", used, [records.key for records in wanted.values()])


def _names(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for length in range(1, 1 + max((len(Path(folder).parts) for folder in folders), default=0)):
        names = ["/".join(Path(folder).parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return list(folders)
