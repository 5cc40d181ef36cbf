"""What goes wrong in another process is one line in this one: real tasks and actors of Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RuntimeEnvSetupError

from semalign.artifacts.artifact import Workspace
from semalign.config.read import resolve
from semalign.config.sections import Evaluation
from semalign.engine import tracking
from semalign.engine.cluster import connect
from semalign.engine.evaluation import score_all
from semalign.engine.tracking import start_tracker
from semalign.errors import Failed, UserError, root_cause
from semalign.models.reference import Model
from semalign.stages.judged import Candidate, served
from semalign.zoo import path as zoo_path


@ray.remote(num_cpus=0, max_retries=0)
def refuses() -> None:
    raise UserError("a=1: expected 2")


@ray.remote(num_cpus=0, max_retries=0)
def passes_on() -> None:
    ray.get(refuses.remote())


def test_an_error_of_a_task_of_a_task_is_the_error(ray_cluster: None) -> None:
    with pytest.raises(UserError) as error:
        ray.get(passes_on.remote())
    assert "Traceback" in str(error.value) or "ray::" in str(error.value)
    assert str(root_cause(error.value)) == "a=1: expected 2"
    with pytest.raises(UserError) as error, connect(None):
        ray.get(passes_on.remote())
    assert str(error.value) == "a=1: expected 2"


class Broken:
    """An engine that does not start."""

    def __init__(self) -> None:
        raise ValueError("head size 8\nis not supported")

    def generate(self, *_: Any) -> None: ...


class Dying:
    """An engine whose process ends, as the system's for want of memory."""

    def generate(self, *_: Any) -> None:
        os._exit(9)


@pytest.mark.parametrize(
    ("engine", "match"),
    [
        (Broken, r"the engine of zoo/student could not be started: (ValueError|is not supported)"),
        (Dying, r"the engine of zoo/student died more often than evaluation.max_restarts allows, "
                r"last with mmlu dev from \S+ on: "),
    ],
)  # fmt: skip
def test_an_engine_that_has_gone_is_named(
    engine: type, match: str, ray_cluster: None, tmp_path: Path
) -> None:
    model = Model.open("zoo/student", dtype="float32", cache=tmp_path)
    handle = ray.remote(engine).options(num_cpus=0).remote()
    with pytest.raises(Failed, match=match) as error:
        score_all(
            [Candidate(name="student", model=model)],
            Evaluation(tasks=("mmlu",), splits=("dev",)),
            root=zoo_path("zoo/data"),
            workspace=Workspace(tmp_path),
            engines={served(model): [handle]},
            judge_cpus=0,
        )
    assert "\n" not in str(error.value)


def test_a_worker_that_cannot_be_set_up_is_no_matter_of_mlflow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unable(*_: Any) -> None:
        raise RuntimeEnvSetupError("the plugin cannot be imported")

    job = resolve([], [f"workdir={tmp_path}"])
    monkeypatch.setattr(tracking, "_actor", unable)
    with pytest.raises(RuntimeEnvSetupError, match="the plugin cannot be imported"):
        start_tracker(job, key="k", name="n")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (
            ["tracking.uri=sqlite:////proc/no/m.db"],
            r"uri=sqlite:////proc/no/m.db: MLflow cannot open it",
        ),
        (["tracking.uri=file:///proc/no"], r"uri=file:///proc/no: MLflow cannot open it"),
        (["tracking.experiment=''"], r"open it, or in it the experiment '' \(Invalid experiment"),
        (["tracking.experiment=" + "x" * 501], r"exceeds the maximum length of 500"),
    ],
)
def test_what_mlflow_refuses_is_one_line(
    overrides: list[str], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # sooner made than a database
    job = resolve(
        [], [f"workdir={tmp_path / 'work'}", f"tracking.uri=file://{tmp_path}", *overrides]
    )
    with pytest.raises(UserError, match=match) as error:
        start_tracker(job, key="k", name="n", local=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
