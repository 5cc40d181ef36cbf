"""One figure of the paper's analysis as a job: computed on the cluster, kept, recorded in MLflow.

<workdir>/analyses/<figure>-<key>/figure.png
                                  data.json       all numbers; layers as the caption says
                                  manifest.json   written last: with it the figure is whole
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from semalign.config import AnalysisJob
from semalign.engine.cluster import cluster_resources, connect
from semalign.engine.tracking import Run, start_tracker
from semalign.errors import UserError
from semalign.report import table
from semalign.report.analysis_figures import DRAW, TABLE
from semalign.stages.analysis_inputs import Inputs, load_inputs
from semalign.stages.axes import flat
from semalign.stages.inputs import check_writable
from semalign.stages.store import sha256, write_json

_FIGURE, _DATA, _MANIFEST = "figure.png", "data.json", "manifest.json"


@ray.remote(max_retries=2)
def _measure(job: AnalysisJob, inputs: Inputs) -> dict[str, Any]:
    """The stage in a process of its own, on the device Ray gave it."""
    import torch

    from semalign.models.loading import load_model
    from semalign.stages.analyze import measure

    resources = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(1, int(resources.get("CPU", 1))))
    device = "cuda" if ray.get_gpu_ids() and job.device_map is None else None

    def load(path: str) -> torch.nn.Module:
        return load_model(
            path,
            dtype=job.dtype,
            device=device,
            device_map=job.device_map,
            trust_remote_code=job.trust_remote_code,
        )

    return measure(job, inputs, load)


def run_analysis(job: AnalysisJob) -> Path:
    """Make the figure, or find it; print its table. Returns its folder.

    Raises UserError for bad input and for more CPUs or GPUs than the cluster has.
    """
    inputs = load_inputs(job)
    check_writable(job.work)
    with connect(job.cluster.address):
        _check_resources(job, cluster_resources())
        run = start_tracker(
            job.tracking_uri,
            job.tracking.experiment,
            key=inputs.key,
            name=job.tracking.run_name or f"analyze-{job.figure}",
            artifacts=str(job.work / "mlartifacts"),
        )
        finished = run.is_finished()
        try:
            folder = _make(job, inputs)
            if not finished:
                _record(run, job, folder)
        except BaseException:
            if not finished:
                run.end("FAILED")
            raise
        _show(job, folder, run.run_id)
    return folder


def show_analysis_plan(job: AnalysisJob) -> None:
    """Print what would be measured and where it goes; loads no weights."""
    inputs = load_inputs(job)
    folder = _folder(job, inputs)
    tokens = sum(len(example.ids) for example in inputs.tokens)
    there = (folder / _MANIFEST).exists()
    print(f"{job.figure}: {len(inputs.tokens)} examples, {tokens} tokens of {job.task} {job.split}")
    print(f"one task of {job.num_cpus:g} CPUs and {job.num_gpus:g} GPUs")
    print(f"{folder}{', already there' if there else ''}")


def _folder(job: AnalysisJob, inputs: Inputs) -> Path:
    return job.work / "analyses" / f"{job.figure}-{inputs.key}"


def _make(job: AnalysisJob, inputs: Inputs) -> Path:
    """The folder of the figure, whole."""
    folder = _folder(job, inputs)
    if (folder / _MANIFEST).exists():
        return folder
    task = _measure.options(num_cpus=job.num_cpus, num_gpus=job.num_gpus)
    write_json(folder / _DATA, ray.get(task.remote(job, inputs)))
    DRAW[job.figure](_read(folder / _DATA)).savefig(folder / _FIGURE, dpi=150)
    files = {name: sha256(folder / name) for name in (_FIGURE, _DATA)}
    settings = job.model_dump(mode="json", exclude={"cluster", "tracking", "workdir"})
    write_json(folder / _MANIFEST, {"sha256": files, "settings": settings})
    return folder


def _record(run: Run, job: AnalysisJob, folder: Path) -> None:
    run.params(flat(job.model_dump(mode="json")))
    for name in (_FIGURE, _DATA):
        run.artifact(str(folder / name))
    run.end("FINISHED")


def _show(job: AnalysisJob, folder: Path, run_id: str) -> None:
    console = Console(soft_wrap=True)
    console.print(table.terminal(*TABLE[job.figure](_read(folder / _DATA))))
    console.print(f"figure and data: {folder}")
    console.print(f"MLflow run {run_id}; to open it:")
    console.print(f"  mlflow ui --host 127.0.0.1 --backend-store-uri {job.tracking_uri}")


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _check_resources(job: AnalysisJob, available: dict[str, float]) -> None:
    """Raise UserError for what the cluster lacks: Ray would wait for it for ever."""
    if job.cluster.autoscaling:
        return
    for key, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        if (wanted := getattr(job, key)) > available[resource]:
            raise UserError(
                f"{key}={wanted:g}: the cluster has {available[resource]:g} {resource}s; ask for "
                "fewer (cluster.autoscaling=true waits for nodes to come)"
            )
