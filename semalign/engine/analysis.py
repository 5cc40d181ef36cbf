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

from semalign.analysis import FIGURES
from semalign.analysis.figure import FigureInputs
from semalign.analysis.inputs import load_figure_inputs
from semalign.artifacts.files import sha256, write_json
from semalign.config.dotted import flat
from semalign.config.jobs import AnalysisJob
from semalign.engine import remote
from semalign.engine.cluster import check_resources, cluster_resources, connect
from semalign.engine.tracking import Run, recorded, to_open
from semalign.report import table
from semalign.stages.inputs import check_writable

_FIGURE, _DATA, _MANIFEST = "figure.png", "data.json", "manifest.json"


def run_analysis(job: AnalysisJob) -> Path:
    """Make the figure, or find it; print its table. Returns its folder.

    Raises UserError for bad input and for more CPUs or GPUs than the cluster has.
    """
    inputs = load_figure_inputs(job)
    check_writable(job.work)
    with connect(job.cluster.address):
        check_resources(job, cluster_resources())
        with recorded(job, key=inputs.key, name=f"analyze-{job.figure}") as run:
            folder = _make(job, inputs)
            if not run.is_finished():
                _record(run, job, folder)
        _show(job, folder, run)
    return folder


def show_analysis_plan(job: AnalysisJob) -> None:
    """Print what would be measured and where it goes; loads no weights."""
    inputs = load_figure_inputs(job)
    folder = _folder(job, inputs)
    tokens = sum(len(example.ids) for example in inputs.tokens)
    there = (folder / _MANIFEST).exists()
    print(f"{job.figure}: {len(inputs.tokens)} examples, {tokens} tokens of {job.task} {job.split}")
    print(f"one task of {job.num_cpus:g} CPUs and {job.num_gpus:g} GPUs")
    print(f"{folder}{', already there' if there else ''}")


def _folder(job: AnalysisJob, inputs: FigureInputs) -> Path:
    return job.work / "analyses" / f"{job.figure}-{inputs.key}"


def _make(job: AnalysisJob, inputs: FigureInputs) -> Path:
    """The folder of the figure, whole."""
    folder = _folder(job, inputs)
    if (folder / _MANIFEST).exists():
        return folder
    task = remote.analyze.options(num_cpus=job.num_cpus, num_gpus=job.num_gpus)
    write_json(folder / _DATA, ray.get(task.remote(job, inputs)))
    FIGURES[job.figure].draw(_read(folder / _DATA)).savefig(folder / _FIGURE, dpi=150)
    files = {name: sha256(folder / name) for name in (_FIGURE, _DATA)}
    settings = job.model_dump(mode="json", exclude={"cluster", "tracking", "workdir"})
    write_json(folder / _MANIFEST, {"sha256": files, "settings": settings})
    return folder


def _record(run: Run, job: AnalysisJob, folder: Path) -> None:
    run.params(flat(job.model_dump(mode="json")))
    for name in (_FIGURE, _DATA):
        run.artifact(str(folder / name))
    run.end("FINISHED")


def _show(job: AnalysisJob, folder: Path, run: Run) -> None:
    console = table.new_console()
    console.print(table.terminal(*FIGURES[job.figure].table(_read(folder / _DATA))))
    console.print(f"figure and data: {folder}")
    console.print(to_open(job, run))


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))
