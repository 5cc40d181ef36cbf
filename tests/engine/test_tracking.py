"""The one writer to MLflow, when a real server is away: at the start, for a while, for good."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from semalign.config.read import resolve
from semalign.engine.tracking import Tracker, start_tracker
from semalign.errors import UserError
from tests.engine.faults import MlflowServer, when


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


def test_a_server_that_comes_back_is_waited_for(
    server: MlflowServer, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(server.uri, "back", "", patience=200)
    tracker.open("sweep", "sweep")
    server.kill()
    with when(lambda: "does not answer" in capsys.readouterr().out, server.start):
        run = tracker.open("trial", "trial")
        tracker.metrics(run, {"loss": [0.5, 0.25]})
        tracker.end(run, "FINISHED")
    assert "answers again" in capsys.readouterr().out
    client = MlflowClient(server.uri)
    runs = client.search_runs([tracker.experiment])
    assert sorted(run.info.run_name for run in runs) == ["sweep", "trial"]
    history = client.get_metric_history(run, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 0.5), (1, 0.25)]


def test_a_server_that_stays_away_is_an_error_and_then_at_once(server: MlflowServer) -> None:
    tracker = Tracker(server.uri, "away", "", patience=2)
    run = tracker.open("sweep", "sweep")
    server.kill()
    for _ in range(2):
        with pytest.raises(UserError, match="no MLflow server answers there; start it, and the sa"):
            tracker.tags(run, {"a": "b"})
        tracker.patience = 1000  # the second time does not wait
    server.start()
    tracker.tags(run, {"a": "b"})
    assert tracker.open("sweep", "sweep") == run


def test_a_server_that_never_was_is_an_error_of_one_line(ray_cluster: None, tmp_path: Path) -> None:
    uri = MlflowServer(tmp_path).uri
    job = resolve([], [f"tracking.uri={uri}", "tracking.experiment=none", f"workdir={tmp_path}"])
    with pytest.raises(UserError) as error:
        start_tracker(job, key="k", name="n")
    assert str(error.value).startswith(f"tracking.uri={uri}: no MLflow server answers there")
    assert "\n" not in str(error.value)
