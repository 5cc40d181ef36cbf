"""A sweep goes on, or is gone on with, after kill -9 of any of its parts; its table is the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from semalign.engine import tracking
from semalign.engine.serving import Engines
from semalign.engine.trial import DIED
from semalign.engine.tuning import ablate
from semalign.errors import UserError
from semalign.report.sweep import Rows, settings_table
from semalign.sweep.file import Sweep, load_sweep
from semalign.sweep.summary import Summary
from tests.engine.faults import MlflowServer, copy_shared, kill, kill_tree, when

SWEEP = """
base:
  data: {task: mmlu, train_limit: 48}
  training: {epochs: 3, batch_size: 16, lr: 1.0e-3}
  evaluation: {tasks: [mmlu]}
  loss.alpha: 0
axes:
  loss.alpha: [0, 0.3]
max_concurrent: 1
"""

TRIAL = "ray::ImplicitFunc"  # the title of a trial's process


@dataclass
class Undisturbed:
    file: Path
    work: Path
    table: Rows
    items: list[object]

    def sweep(self, work: Path, *overrides: str) -> Sweep:
        copy_shared(self.work, work)
        return load_sweep(self.file, [f"workdir={work}", *overrides])

    def check(self, summary: Summary) -> None:
        assert settings_table(summary) == self.table
        assert [result.items for result in summary.results] == self.items


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, engines: Engines) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    file, work = folder / "two.yaml", folder / "work"
    file.write_text(SWEEP)
    summary = ablate(load_sweep(file, [f"workdir={work}"]), engines=engines)
    assert [result.state for result in summary.results] == ["finished"] * 2
    items = [result.items for result in summary.results]
    return Undisturbed(file, work, settings_table(summary), items)


def finished(work: Path) -> dict[str, float]:
    """The trials that have finished, and when."""
    return {file.name: file.stat().st_mtime for file in work.glob("sweeps/*/finished/*.json")}


def check_runs(uri: str) -> None:
    """The sweep and its two trials, each once, all finished."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("semalign")
    found = [
        (run.info.run_name, run.info.status)
        for run in client.search_runs([experiment.experiment_id])
    ]
    names = ["loss.alpha=0, seed=0", "loss.alpha=0.3, seed=0", "two"]
    assert sorted(found) == [(name, "FINISHED") for name in names]


def checkpoints(work: Path) -> list[Path]:
    return list(work.glob("unfinished/training-*/checkpoint_*/state.pt"))


def test_a_training_worker_and_an_engine_die(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """One of two workers in the first trial, the engine before the second: its second life serves
    it.
    """
    sweep = undisturbed.sweep(tmp_path, "training.num_workers=2")
    with (
        when(lambda: checkpoints(tmp_path), lambda: kill("ray::RayTrainWorker")),
        when(lambda: finished(tmp_path), lambda: kill("ray::Engine")),
    ):
        undisturbed.check(ablate(sweep))
    check_runs(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_trial_that_trains_in_its_own_process_dies(
    undisturbed: Undisturbed,
    engines: Engines,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The other one goes on; the same command again trains it from its last checkpoint."""
    sweep = undisturbed.sweep(tmp_path)
    with when(lambda: checkpoints(tmp_path), lambda: kill(TRIAL)):
        summary = ablate(sweep, engines=engines)
    assert [result.state for result in summary.results] == ["failed", "finished"]
    assert summary.results[0].error == DIED
    first = finished(tmp_path)
    assert checkpoints(tmp_path)
    capfd.readouterr()
    undisturbed.check(ablate(sweep, engines=engines))
    epochs = capfd.readouterr()
    assert "epoch 3: " in epochs.err + epochs.out and "epoch 1: " not in epochs.err + epochs.out
    assert len(first) == 1 and first.items() <= finished(tmp_path).items()
    check_runs(f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path)
    server.start()
    yield server
    server.kill()


def test_the_mlflow_server_dies(
    undisturbed: Undisturbed,
    engines: Engines,
    server: MlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE", 2.0)
    sweep = undisturbed.sweep(tmp_path, f"tracking.uri={server.uri}")
    with (
        when(lambda: finished(tmp_path), server.kill),
        pytest.raises(UserError, match="no MLflow server answers there; start it, and the same"),
    ):
        ablate(sweep, engines=engines)
    first = finished(tmp_path)
    server.start()
    undisturbed.check(ablate(sweep, engines=engines))
    assert len(first) == 1 and first.items() <= finished(tmp_path).items()
    check_runs(server.uri)


def test_driver_and_cluster_die_together(
    undisturbed: Undisturbed, engines: Engines, tmp_path: Path
) -> None:
    sweep = undisturbed.sweep(tmp_path)
    command = [sys.executable, "ray_jobs/ablate.py", f"sweep={undisturbed.file}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    driver = subprocess.Popen([*command, f"workdir={tmp_path}"], start_new_session=True, **quiet)
    with when(lambda: finished(tmp_path), lambda: kill_tree(driver)):
        driver.wait()
    first = finished(tmp_path)
    undisturbed.check(ablate(sweep, engines=engines))
    assert len(first) == 1 and first.items() <= finished(tmp_path).items()
    check_runs(f"sqlite:///{tmp_path / 'mlflow.db'}")
