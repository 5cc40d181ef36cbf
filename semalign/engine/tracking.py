"""The one writer to MLflow: an actor that every process of a run sends its records to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from semalign.errors import UserError

PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000
KEY_TAG = "semalign.key"


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
    """Writes one MLflow run; found again by `key`, so that a rerun goes on in the same run."""

    def __init__(self, uri: str, experiment: str, key: str, name: str, artifacts: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import ViewType

        self.client = MlflowClient(tracking_uri=uri)
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            location = Path(artifacts).as_uri() if uri.startswith(("sqlite", "file")) else None
            self.experiment = self.client.create_experiment(experiment, artifact_location=location)
        else:
            self.experiment = found.experiment_id
        runs = self.client.search_runs(
            [self.experiment], f"tags.`{KEY_TAG}` = '{key}'", ViewType.ACTIVE_ONLY, max_results=1
        )
        if runs:
            self.run = runs[0].info.run_id
            if not self.is_finished():
                self.client.update_run(self.run, status="RUNNING")
        else:
            tags = {KEY_TAG: key}
            self.run = self.client.create_run(self.experiment, tags=tags, run_name=name).info.run_id

    def run_id(self) -> str:
        return str(self.run)

    def is_finished(self) -> bool:
        return bool(self.client.get_run(self.run).info.status == "FINISHED")

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters are immutable in MLflow: those already there are left as they are."""
        from mlflow.entities import Param

        there = self.client.get_run(self.run).data.params
        new = [Param(k, str(v)[:6000]) for k, v in sorted(values.items()) if k not in there]
        for start in range(0, len(new), PARAMS_PER_CALL):
            self.client.log_batch(self.run, params=new[start : start + PARAMS_PER_CALL])

    def tags(self, values: Mapping[str, str]) -> None:
        for key, value in values.items():
            self.client.set_tag(self.run, key, value)

    def metrics(self, series: Mapping[str, Sequence[float]], *, first_step: int = 0) -> None:
        """Each name's values at first_step, first_step + 1, ..."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(name, float(value), now, first_step + offset)
            for name, values in series.items()
            for offset, value in enumerate(values)
        ]
        for start in range(0, len(points), METRICS_PER_CALL):
            self.client.log_batch(self.run, metrics=points[start : start + METRICS_PER_CALL])

    def dataset(self, name: str, digest: str, source: str, context: str, rows: int) -> None:
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
        self.client.log_inputs(self.run, datasets=[DatasetInput(data, [tag])])

    def table(self, frame: Any, file: str) -> None:
        """A pandas table, as MLflow shows tables."""
        self.client.log_table(self.run, frame, artifact_file=file)

    def artifact(self, path: str, folder: str | None = None) -> None:
        """Upload a file, or a folder whole."""
        if Path(path).is_dir():
            self.client.log_artifacts(self.run, path, folder)
        else:
            self.client.log_artifact(self.run, path, folder)

    def end(self, status: str) -> None:
        self.client.set_terminated(self.run, status)


class Run:
    """The driver's hold of a run: every method of Tracker, waited for. Workers get `actor`."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.run_id: str = ray.get(actor.run_id.remote())

    def __getattr__(self, method: str) -> Callable[..., Any]:
        remote = getattr(self.actor, method).remote
        return lambda *args, **kwargs: ray.get(remote(*args, **kwargs))


def start_tracker(uri: str, experiment: str, *, key: str, name: str, artifacts: str) -> Run:
    """Start the tracker on this node, where the files it uploads are.

    Raises UserError when the URI is relative or cannot be opened.
    """
    check_uri(uri)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = (
        ray.remote(Tracker)
        .options(num_cpus=0, max_restarts=3, max_task_retries=3, scheduling_strategy=here)
        .remote(uri, experiment, key, name, artifacts)
    )
    try:
        return Run(actor)
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1]
        raise UserError(f"tracking.uri={uri}: MLflow cannot open it ({cause})") from None
