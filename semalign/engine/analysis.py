"""One figure of the paper's analysis as a job: made on the cluster, recorded in MLflow."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

from semalign.analysis.artifact import DATA, IMAGE, DrawnFigure
from semalign.analysis.inputs import load_figure_inputs
from semalign.artifacts.artifact import Workspace
from semalign.artifacts.host import Host
from semalign.config.dotted import flat
from semalign.config.jobs import AnalysisJob
from semalign.engine.tracking import Run, recorded, to_open
from semalign.files import check_writable, naming_full_disk
from semalign.report import table


def run_analysis(job: AnalysisJob, *, local: bool = False) -> Path:
    """Make the figure, or find it; print its table. Returns its folder.

    `local`: in this process, without Ray. Raises UserError for bad input and for more CPUs or GPUs
    than the cluster has.
    """
    drawn, workspace = _drawn(job), Workspace(job.work)
    check_writable(job.work)
    with contextlib.ExitStack() as stack:
        stack.enter_context(naming_full_disk(job.work, lambda: drawn.cost().disk))
        if not local:
            from semalign.engine.cluster import check_resources, cluster_resources, connect

            stack.enter_context(connect(job.cluster.address))
            check_resources(job, cluster_resources())
        run = stack.enter_context(
            recorded(job, key=drawn.key, name=f"analyze-{job.figure}", local=local)
        )
        if local:
            make = partial(drawn.make, host=Host(workspace, device_map=job.device_map))
        else:
            from semalign.engine.executor import make_alone

            make = partial(make_alone, drawn, workspace, job)
        workspace.ensure(drawn, make)
        folder = workspace.place(drawn)
        if not run.is_finished():
            _record(run, job, folder)
        _show(drawn, folder, run)
    return folder


def show_analysis_plan(job: AnalysisJob) -> None:
    """Print what would be measured and where it goes; loads no weights."""
    drawn = _drawn(job)
    workspace, rows = Workspace(job.work), drawn.inputs.tokens
    folder = workspace.place(drawn)
    tokens = sum(len(example.ids) for example in rows)
    print(f"{job.figure}: {len(rows)} examples, {tokens} tokens of {job.task} {job.split}")
    print(f"one task of {job.num_cpus:g} CPUs and {job.num_gpus:g} GPUs")
    print(f"{folder}{', cached' if workspace.has(drawn) else ''}")


def _drawn(job: AnalysisJob) -> DrawnFigure:
    return DrawnFigure(job=job, inputs=load_figure_inputs(job))


def _record(run: Run, job: AnalysisJob, folder: Path) -> None:
    run.params(flat(job.model_dump(mode="json")))
    for name in (IMAGE, DATA):
        run.artifact(str(folder / name))
    run.end("FINISHED")


def _show(drawn: DrawnFigure, folder: Path, run: Run) -> None:
    console = table.new_console()
    console.print(table.terminal(*drawn.figure.table(drawn.read(folder))))
    console.print(f"figure and data: {folder}")
    console.print(to_open(drawn.job, run))
