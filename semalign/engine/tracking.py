"""The one writer to MLflow: an actor that every process of a run sends its records to, or an object
of this process where there is no Ray.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from semalign.config.jobs import Job
from semalign.errors import UserError, one_line, root_cause
from semalign.files import disk_full, locked

PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000
NAME_LENGTH = 250  # of a run's name, in the databases of MLflow
KEY_TAG = "semalign.key"
PARENT_TAG = "mlflow.parentRunId"  # how MLflow itself nests runs
PATIENCE = 120.0  # seconds that a server may be away: long enough to start it again

_Method = TypeVar("_Method", bound=Callable[..., Any])


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


def _patient(method: _Method) -> _Method:
    """A method of Tracker that waits for a server that is away, and is then made again whole.

    After `patience` seconds it raises UserError, and so do later calls, at once, until one gets
    through; so does the first call of all.
    """

    @functools.wraps(method)
    def call(tracker: Tracker, *args: Any, **kwargs: Any) -> Any:
        from mlflow.exceptions import MlflowException

        patience = tracker.patience if tracker.reached else 0
        begin: float | None = None  # of the wait
        while True:
            try:
                answer = method(tracker, *args, **kwargs)
            except MlflowException as error:
                if not _away(error):
                    raise
                if begin is None:
                    begin = time.monotonic()
                    if patience:
                        _say(f"{tracker.uri} does not answer; waiting up to {patience:.0f} s")
                if time.monotonic() - begin >= patience:
                    tracker.reached = False
                    raise UserError(
                        f"tracking.uri={tracker.uri}: no MLflow server answers there; start it, "
                        "and the same command again goes on where this one was"
                    ) from None
                time.sleep(1)
            else:
                if begin is not None:
                    _say(f"{tracker.uri} answers again")
                tracker.reached = True
                return answer

    return cast(_Method, call)


def _away(error: Exception) -> bool:
    """Whether the server did not answer at all, which MLflow has no class of its own for."""
    from mlflow.exceptions import RestException

    return not isinstance(error, RestException) and "API request to" in str(error)


def _say(text: str) -> None:
    print(f"[mlflow] {text}", flush=True)


class Tracker:
    """Writes the runs of one experiment. A run is found again by its key, so that a rerun goes on
    in the same one.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str, patience: float) -> None:
        self.uri, self.name, self.artifacts, self.patience = uri, experiment, artifacts, patience
        self.reached = False

    @functools.cached_property
    def client(self) -> Any:
        # MLflow's own waits, of minutes and without a word, would come on top of ours
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    @functools.cached_property
    def experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.name)
        if found is not None:
            return str(found.experiment_id)
        local = self.uri.startswith(("sqlite", "file"))
        location = Path(self.artifacts).as_uri() if local else None
        return str(self.client.create_experiment(self.name, artifact_location=location))

    @_patient
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
            short = one_line(name, limit=NAME_LENGTH)
            made = self.client.create_run(self.experiment, tags=tags, run_name=short)
            return str(made.info.run_id)
        run = str(runs[0].info.run_id)
        if not self.is_finished(run):
            self.client.update_run(run, status="RUNNING")
        return run

    @_patient
    def is_finished(self, run: str) -> bool:
        return bool(self.client.get_run(run).info.status == "FINISHED")

    @_patient
    def params(self, run: str, values: Mapping[str, Any]) -> None:
        """Parameters are immutable in MLflow: those already there are left as they are."""
        from mlflow.entities import Param

        there = self.client.get_run(run).data.params
        new = [Param(k, str(v)[:6000]) for k, v in sorted(values.items()) if k not in there]
        for start in range(0, len(new), PARAMS_PER_CALL):
            self.client.log_batch(run, params=new[start : start + PARAMS_PER_CALL])

    @_patient
    def tags(self, run: str, values: Mapping[str, str]) -> None:
        for key, value in values.items():
            self.client.set_tag(run, key, value)

    @_patient
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

    @_patient
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

    @_patient
    def table(self, run: str, frame: Any, file: str) -> None:
        """A pandas table, as MLflow shows tables."""
        self.client.log_table(run, frame, artifact_file=file)

    @_patient
    def artifact(self, run: str, path: str, folder: str | None = None) -> None:
        """Upload a file, or a folder whole."""
        if Path(path).is_dir():
            self.client.log_artifacts(run, path, folder)
        else:
            self.client.log_artifact(run, path, folder)

    @_patient
    def end(self, run: str, status: str) -> None:
        self.client.set_terminated(run, status)


@dataclass(frozen=True)
class Run:
    """A run in the hands of the driver or a worker: every method of Tracker, waited for.

    `tracker` is a Tracker, or the handle of the actor that it runs in.
    """

    tracker: Any
    run_id: str

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("__"):
            raise AttributeError(method)
        return lambda *args, **kwargs: _call(self.tracker, method, self.run_id, *args, **kwargs)

    def child(self, *, key: str, name: str) -> Run:
        """A run below this one."""
        return Run(self.tracker, _call(self.tracker, "open", key, name, self.run_id))


def _call(tracker: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    bound = getattr(tracker, method)
    if not hasattr(bound, "remote"):
        return bound(*args, **kwargs)
    import ray

    return ray.get(bound.remote(*args, **kwargs))


def _actor(*arguments: Any) -> Any:
    """A Tracker on this node, where the files it uploads are."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": 3, "max_task_retries": 3}
    return ray.remote(Tracker).options(**options, scheduling_strategy=here).remote(*arguments)


def start_tracker(job: Job, *, key: str, name: str, local: bool = False) -> Run:
    """Start the tracker and open a run.

    Raises UserError when the URI is relative or cannot be opened. So does every method of the run
    when a server has been away for PATIENCE seconds.
    """
    uri, experiment = job.tracking_uri, job.tracking.experiment
    check_uri(uri)
    arguments = uri, experiment, str(job.work / "mlartifacts"), PATIENCE
    # MLflow's first opening of a new database breaks when two processes do it at once
    with locked(job.work / "unfinished" / "mlflow.lock", "MLflow's database is being opened"):
        tracker = Tracker(*arguments) if local else _actor(*arguments)
        try:
            return Run(tracker, _call(tracker, "open", key, name))
        except Exception as error:
            cause = root_cause(error)
            # what MLflow raises is a matter of the URI; a process that Ray cannot start is not
            if isinstance(cause, UserError) or _of_ray(cause) or disk_full(cause):
                raise cause from error
            reason = one_line(cause, limit=300)
            raise UserError(
                f"tracking.uri={uri}: MLflow cannot open it, or in it the experiment "
                f"'{one_line(experiment, limit=60)}' ({reason})"
            ) from error


def _of_ray(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"


@contextmanager
def recorded(job: Job, *, key: str, name: str, local: bool = False) -> Iterator[Run]:
    """The run of that key, made if there is none; what goes wrong within ends it as FAILED, an
    interrupt as KILLED, unless it was finished before.

    Of two processes that do the same, one waits until the other has finished. Raises UserError as
    `start_tracker` does.
    """
    name = job.tracking.run_name or name
    with locked(job.work / "unfinished" / f"run-{key}.lock", f"the same run, {name}, is under way"):
        run = start_tracker(job, key=key, name=name, local=local)
        finished = run.is_finished()
        try:
            yield run
        except BaseException as error:
            if not finished:
                failed = isinstance(error, Exception)
                with contextlib.suppress(Exception):  # MLflow may be what has failed
                    run.end("FAILED" if failed else "KILLED")
            raise


def to_open(job: Job, run: Run) -> str:
    """Which run it is, and how to look at it."""
    command = f"mlflow ui --host 127.0.0.1 --backend-store-uri {shlex.quote(job.tracking_uri)}"
    return f"MLflow run {run.run_id}; to open it:\n  {command}"
