"""The one writer to MLflow: an actor that every process of a run sends its records to."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from semalign.errors import UserError

PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000
KEY_TAG = "semalign.key"
PARENT_TAG = "mlflow.parentRunId"  # how MLflow itself nests runs


def check_uri(uri: str) -> None:
    """MLflow's sqlite and file stores need absolute paths: Ray changes the working directory."""
    scheme, _, rest = uri.partition(":")
    absolute = rest.startswith("////") if scheme == "sqlite" else rest.startswith("//")
    if scheme not in ("sqlite", "file", "http", "https", "databricks", "postgresql", "mysql"):
        raise UserError(
            f"tracking.uri={uri}: expected sqlite:////absolute/path.db, file:// or http(s)://"
        )
    if not absolute:
        raise UserError(
            f"tracking.uri={uri}: the path must be absolute, e.g. sqlite:////tmp/mlflow.db"
        )


class Tracker:
    """Writes the runs of one experiment. A run is found again by its key, so that a rerun goes on
    in the same one.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            location = Path(artifacts).as_uri() if uri.startswith(("sqlite", "file")) else None
            self.experiment = self.client.create_experiment(experiment, artifact_location=location)
        else:
            self.experiment = found.experiment_id

    def open(self, key: str, name: str, parent: str | None = None) -> str:
        """The id of the run of that key (and parent), made if there is none."""
        from mlflow.entities import ViewType

        tags = {KEY_TAG: key} | ({PARENT_TAG: parent} if parent else {})
        wanted = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        runs = [
            run
            for run in self.client.search_runs([self.experiment], wanted, ViewType.ACTIVE_ONLY)
            if run.data.tags.get(PARENT_TAG) == parent
        ]
        if not runs:
            made = self.client.create_run(self.experiment, tags=tags, run_name=name)
            return str(made.info.run_id)
        run = str(runs[0].info.run_id)
        if not self.is_finished(run):
            self.client.update_run(run, status="RUNNING")
        return run

    def is_finished(self, run: str) -> bool:
        return bool(self.client.get_run(run).info.status == "FINISHED")

    def params(self, run: str, values: Mapping[str, Any]) -> None:
        """Parameters are immutable in MLflow: those already there are left as they are."""
        from mlflow.entities import Param

        there = self.client.get_run(run).data.params
        new = [Param(k, str(v)[:6000]) for k, v in sorted(values.items()) if k not in there]
        for start in range(0, len(new), PARAMS_PER_CALL):
            self.client.log_batch(run, params=new[start : start + PARAMS_PER_CALL])

    def tags(self, run: str, values: Mapping[str, str]) -> None:
        for key, value in values.items():
            self.client.set_tag(run, key, value)

    def metrics(
        self, run: str, series: Mapping[str, Sequence[float]], *, first_step: int = 0
    ) -> None:
        """Each name's values at first_step, first_step + 1, ...; NaN, where a step has no value,
        is left out.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(name, float(value), now, first_step + offset)
            for name, values in series.items()
            for offset, value in enumerate(values)
            if not math.isnan(value)
        ]
        for start in range(0, len(points), METRICS_PER_CALL):
            self.client.log_batch(run, metrics=points[start : start + METRICS_PER_CALL])

    def dataset(
        self, run: str, name: str, digest: str, source: str, context: str, rows: int
    ) -> None:
        """Record which data a run used."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name,
            digest[:36],
            "local",
            json.dumps({"uri": source}),
            None,
            json.dumps({"num_rows": rows}),
        )
        tag = InputTag("mlflow.data.context", context)
        self.client.log_inputs(run, datasets=[DatasetInput(data, [tag])])

    def table(self, run: str, frame: Any, file: str) -> None:
        """A pandas table, as MLflow shows tables."""
        self.client.log_table(run, frame, artifact_file=file)

    def artifact(self, run: str, path: str, folder: str | None = None) -> None:
        """Upload a file, or a folder whole."""
        if Path(path).is_dir():
            self.client.log_artifacts(run, path, folder)
        else:
            self.client.log_artifact(run, path, folder)

    def end(self, run: str, status: str) -> None:
        self.client.set_terminated(run, status)


@dataclass(frozen=True)
class Run:
    """A run in the hands of the driver or a worker: every method of Tracker, waited for."""

    actor: Any
    run_id: str

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("__"):
            raise AttributeError(method)
        remote = getattr(self.actor, method).remote
        return lambda *args, **kwargs: ray.get(remote(self.run_id, *args, **kwargs))

    def child(self, *, key: str, name: str) -> Run:
        """A run below this one."""
        opened = self.actor.open.remote(key, name, self.run_id)
        return Run(self.actor, ray.get(opened))


def start_tracker(uri: str, experiment: str, *, key: str, name: str, artifacts: str) -> Run:
    """Start the tracker on this node, where the files it uploads are, and open a run.

    Raises UserError when the URI is relative or cannot be opened.
    """
    check_uri(uri)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = (
        ray.remote(Tracker)
        .options(num_cpus=0, max_restarts=3, max_task_retries=3, scheduling_strategy=here)
        .remote(uri, experiment, artifacts)
    )
    try:
        return Run(actor, ray.get(actor.open.remote(key, name)))
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1]
        raise UserError(f"tracking.uri={uri}: MLflow cannot open it ({cause})") from None
