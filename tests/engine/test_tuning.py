"""A real sweep of three trials on Ray Tune: shared work is done once, failures stay alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from mlflow.entities import Run

from semalign.config.read import resolve
from semalign.engine.serving import Engines
from semalign.engine.trial import is_done
from semalign.engine.tuning import ablate
from semalign.errors import Failed
from semalign.methods.method import used_settings
from semalign.report.sweep import settings_table
from semalign.sweep.file import load_sweep
from semalign.sweep.summary import Summary
from tests.engine.faults import MlflowServer, copy_shared, when

SWEEP = """
base:
  data: {task: mmlu, train_limit: 32}
  training: {epochs: 1, batch_size: 16, lr: 1.0e-3}
  evaluation: {tasks: [mmlu]}
  loss.alpha: 0
axes:
  variant:
    cases:
      cross-entropy: {loss.alpha: 0}
      semalign: {loss.alpha: 0.3, pairing.explicit: [[2, 1]], pairing.strategy: explicit}
      broken: {training.lr: 1.0e+20}
"""

BROKEN = """
base:
  data: {task: mmlu, train_limit: 32}
  training: {epochs: 1, batch_size: 16, lr: 1.0e+20}
  evaluation: {tasks: [mmlu]}
  loss.alpha: 0
axes: {loss.beta: [1.0]}
"""

# A learning rate that changes nothing, then one that destroys the student: after it, for a trial is
# held against those that were there before it.
ASHA = """
base:
  data: {task: mmlu, train_limit: 32}
  training: {epochs: 2, batch_size: 16, lr: 1.0e-5}
  evaluation: {tasks: [mmlu]}
  loss.alpha: 0
axes:
  training.lr: [1.0e-5, 0.3]
scheduler: {asha: {grace_epochs: 1, reduction_factor: 2}}
max_concurrent: 1
"""


@dataclass
class Done:
    summary: Summary
    printed: str
    work: Path
    file: Path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[Done]:
    folder = tmp_path_factory.mktemp("sweep")
    file, work = folder / "three.yaml", folder / "work"
    file.write_text(SWEEP)
    with redirect_stdout(StringIO()) as printed:
        summary = ablate(load_sweep(file, [f"workdir={work}"]))
    yield Done(summary, printed.getvalue(), work, file)


def runs(work: Path) -> dict[str, Run]:
    client = MlflowClient(tracking_uri=f"sqlite:///{work / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("semalign")
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found), "a run is there twice"
    return {run.info.run_name: run for run in found}


def test_shared_work_is_done_once(done: Done) -> None:
    assert re.findall(r"\[(?:attribute|extract|engines)\].*", done.printed) == [
        *re.findall(r"\[engines\] 1 for zoo/student.*", done.printed),
        *re.findall(r"\[attribute\] .*", done.printed),
        *re.findall(r"\[extract\] .*layers \(counted from 1\): mlp 2;.*", done.printed),
    ]
    assert len(re.findall(r"\[extract\]|\[engines\]|\[attribute\]", done.printed)) == 3


def test_a_failed_trial_does_not_stop_the_others(done: Done) -> None:
    states = {r.trial.axes["variant"]: r.state for r in done.summary.results}
    assert states == {"cross-entropy": "finished", "semalign": "finished", "broken": "failed"}
    assert done.summary.chosen is not None and done.summary.chosen.trial.axes["variant"] != "broken"
    assert settings_table(done.summary)[1][0][0] == "student"
    [report] = done.work.glob("sweeps/*/report.md")
    assert "loss is nan" in report.read_text()


def test_only_what_is_shown_is_scored_on_the_report_split(done: Done) -> None:
    scored = {r.trial.axes["variant"]: [*r.items] for r in done.summary.results}
    assert scored == {
        "cross-entropy": [("mmlu", "dev"), ("mmlu", "test")],
        "semalign": [("mmlu", "dev")],
        "broken": [],
    }


def test_parent_and_children_in_mlflow(done: Done) -> None:
    found = runs(done.work)
    parent = found.pop("three")
    assert parent.info.status == "FINISHED" and parent.data.metrics["trials/failed"] == 1
    assert len(found) == 3
    for name, run in found.items():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("FAILED" if "broken" in name else "FINISHED")
    assert "loss is nan" in found["variant=broken, seed=0"].data.tags["error"]
    for result in done.summary.results:  # what has no effect in a trial is no parameter of its run
        run = found[f"{result.trial.label}, seed={result.trial.seed}"]
        settings = used_settings(result.trial.config)
        assert run.data.params == {name: str(value) for name, value in settings.items()}
        assert {"loss.alpha", "training.lr", "seed"} <= set(run.data.params)
    dev, test = "dev/mmlu/transferred", "test/mmlu/transferred.stderr"
    shown, other = (found[f"variant={name}, seed=0"].data for name in ("cross-entropy", "semalign"))
    assert {"epoch/loss", dev, test} <= set(shown.metrics)  # the base, and the one that is chosen
    assert dev in other.metrics and test not in other.metrics
    files = MlflowClient(f"sqlite:///{done.work / 'mlflow.db'}").list_artifacts(parent.info.run_id)
    assert {"best.yaml", "report.md", "trials.csv", "figures"} <= {file.path for file in files}


def test_the_best_configuration_is_a_transfers(done: Done) -> None:
    [best] = done.work.glob("sweeps/*/best.yaml")
    assert done.summary.chosen is not None
    wanted = done.summary.chosen.trial.config
    found = resolve([best], [f"workdir={wanted.workdir}"])
    assert found == wanted


def test_finished_trials_are_not_run_again(
    done: Done, engines: Engines, capsys: pytest.CaptureFixture[str]
) -> None:
    before = runs(done.work)
    again = ablate(load_sweep(done.file, [f"workdir={done.work}"]), engines=engines)
    printed = capsys.readouterr().out
    assert "[sweep] 3 trials, 2 finished before" in printed
    assert "[trial 1/1] variant=broken" in printed and "[extract]" not in printed
    assert [r.items for r in again.results] == [r.items for r in done.summary.results]
    after = runs(done.work)
    assert {name: run.info.run_id for name, run in before.items()} == {
        name: run.info.run_id for name, run in after.items()
    }


def test_a_sweep_in_which_nothing_finishes_has_failed(
    done: Done, engines: Engines, tmp_path: Path
) -> None:
    """Its report is there all the same."""
    file = tmp_path / "broken.yaml"
    file.write_text(BROKEN)
    copy_shared(done.work, tmp_path / "work")
    with pytest.raises(Failed, match=r"^sweep broken: no trial finished; see .*report.md$"):
        ablate(load_sweep(file, [f"workdir={tmp_path / 'work'}"]), engines=engines)
    assert {run.info.status for run in runs(tmp_path / "work").values()} == {"FAILED"}
    [report] = tmp_path.glob("work/sweeps/*/report.md")
    assert "loss is nan" in report.read_text()


def test_a_killed_driver_goes_on(done: Done, engines: Engines, tmp_path: Path) -> None:
    """Kill -9 after the first trial; the rerun's scores are the undisturbed sweep's."""
    command = [sys.executable, "ray_jobs/ablate.py", f"sweep={done.file}", f"workdir={tmp_path}"]
    command.append("sweep.max_concurrent=1")  # or two may finish at once
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    copy_shared(done.work, tmp_path)
    killed = subprocess.Popen(command, start_new_session=True, **quiet)
    with when(lambda: list(tmp_path.glob("sweeps/*/finished/*.json")), killed.kill):
        killed.wait()
    first = {path.name: path.stat().st_mtime for path in tmp_path.glob("sweeps/*/finished/*.json")}
    assert len(first) == 1
    summary = ablate(load_sweep(done.file, [f"workdir={tmp_path}"]), engines=engines)
    assert [r.items for r in summary.results] == [r.items for r in done.summary.results]
    for path in tmp_path.glob("sweeps/*/finished/*.json"):
        assert first.get(path.name) in (None, path.stat().st_mtime)
    assert len(runs(tmp_path)) == 4


def test_the_scheduler_stops_a_trial_that_fell_behind(
    engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It frees its CPUs, and is remembered while scheduler and trials are the same."""
    file = tmp_path / "asha.yaml"
    file.write_text(ASHA)
    summary = ablate(load_sweep(file, [f"workdir={tmp_path / 'work'}"]), engines=engines)
    states = {r.trial.axes["training.lr"]: r.state for r in summary.results}
    assert states == {1e-5: "finished", 0.3: "stopped early"}
    deadline = time.monotonic() + 5
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2
    capsys.readouterr()
    again = ablate(load_sweep(file, [f"workdir={tmp_path / 'work'}"]), engines=engines)
    assert "2 trials, 2 finished before" in capsys.readouterr().out
    assert settings_table(again) == settings_table(summary)
    found = runs(tmp_path / "work")
    assert found["training.lr=0.3, seed=0"].info.status == "KILLED"
    [stopped] = (tmp_path / "work").glob("sweeps/*/stopped/*.json")
    assert json.loads(stopped.read_text())["epoch"] == 1
    [trial] = [r.trial for r in summary.results if r.state == "stopped early"]
    for overrides, done in (
        ([], True),
        (["sweep.scheduler.asha.reduction_factor=3"], False),
        (["sweep.scheduler=null"], False),
    ):
        sweep = load_sweep(file, [f"workdir={tmp_path / 'work'}", *overrides])
        assert is_done(stopped.parents[1], trial, sweep) == done


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at MLflow with")
def test_the_comparison_page_of_mlflow(done: Done, tmp_path: Path) -> None:
    """The page on which MLflow compares the trials, in a headless browser; kept as a picture."""
    found = runs(done.work)
    chosen = [run.info.run_id for name, run in found.items() if name.endswith("seed=0")]
    server = MlflowServer(done.work, "mlflow.db")
    server.start()
    try:
        shown = json.dumps(chosen, separators=(",", ":")).replace('"', "%22")
        page = f"{server.uri}/#/compare-runs?runs={shown}&experiments=%5B%221%22%5D"
        folder = Path(os.environ.get("SEMALIGN_ARTIFACTS", tmp_path))
        picture = folder / "mlflow-comparison.png"
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
        browser += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=25000"]
        browser += ["--window-size=1400,1800"]
        for options in ([f"--screenshot={picture}"], ["--dump-dom"]):
            seen = subprocess.run(
                [*browser, *options, page], capture_output=True, text=True, timeout=120
            )
    finally:
        server.kill()
    assert picture.stat().st_size > 50_000
    assert "variant=semalign, seed=0" in seen.stdout and "loss.alpha" in seen.stdout


SEARCH = """
base:
  data: {task: mmlu, train_limit: 32}
  training: {epochs: 1, batch_size: 16, lr: 1.0e-3}
  evaluation: {tasks: [mmlu], splits: [dev, test]}
  loss.alpha: 0
axes: {training.lr: {loguniform: [1.0e-4, 1.0e-2]}}
samples: 5
search: optuna
"""


def test_a_search_goes_on_from_the_scores_and_is_found_again(
    tmp_path: Path, ray_cluster: None
) -> None:
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    file, work = tmp_path / "search.yaml", tmp_path / "work"
    file.write_text(SEARCH)
    printed = []
    for _ in range(2):
        with redirect_stdout(StringIO()) as out:
            summary = ablate(load_sweep(file, [f"workdir={work}"]))
        printed.append(out.getvalue())
    assert [result.state for result in summary.results] == ["finished"] * 6
    rounds = ["[sweep] 1 trials", "[sweep] 4 trials", "[sweep] 1 trials"]
    assert re.findall(r"\[sweep\] \d trials", printed[0]) == rounds
    assert printed[0].count("[engines]") == 1 and printed[1].count("[engines]") == 0
    assert re.findall(r"(\d) finished before", printed[1]) == ["1", "4", "1"]
    assert len(runs(work)) == 7
