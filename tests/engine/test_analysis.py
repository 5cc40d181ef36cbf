"""analyze.py as a job: its files, its MLflow run, and one clear line for each bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from semalign import cli
from semalign.analysis import FIGURES
from semalign.analysis.inputs import load_figure_inputs
from semalign.config.jobs import AnalysisJob
from semalign.config.read import resolve
from semalign.engine.analysis import run_analysis
from semalign.models.loading import load_model

Complain = Callable[..., str]


@pytest.fixture
def complain(tmp_path: Path, capsys: Any) -> Complain:
    """Run analyze.py's main with overrides; the one line it prints."""

    def run(*overrides: str) -> str:
        work = tmp_path / "work"
        given = [f"workdir={work}", *overrides]
        status = cli.main(["analyze", *given])
        error = capsys.readouterr().err
        assert status == 2 and "Traceback" not in error
        assert not (work / "analyses").exists()
        [line] = [text for text in error.splitlines() if text.startswith("error: ")]
        return line

    return run


def test_unknown_names(complain: Complain, tmp_path: Path) -> None:
    line = complain("figure=similarty")
    assert line == "error: figure=similarty: did you mean 'similarity'?"
    assert complain("modle=x") == "error: modle: unknown key; did you mean 'model'?"
    assert "model folder '/nowhere' does not exist" in complain("model=/nowhere")
    assert "no split 'extrct'" in complain("split=extrct")
    line = complain("figure=similarity", "model=zoo/student")
    assert line.startswith("error: model: figure=similarity does not use it; expected some of:")
    line = complain("figure=similarity", f"adapter={tmp_path}")
    assert "no adapter_config.json" in line
    assert "positions=2: Input should be greater than" in complain("positions=2")


def test_more_gpus_than_exist(complain: Complain, ray_cluster: None) -> None:
    line = complain("num_gpus=64")
    assert line.startswith("error: num_gpus=64: needs 64 GPUs, the cluster has 0; ask for fewer")


def test_one_job_leaves_a_figure_its_data_and_a_run(
    ray_cluster: None, tmp_path: Path, capsys: Any
) -> None:
    overrides = ["figure=similarity", "limit=4", f"workdir={tmp_path}"]
    job = resolve([], overrides, AnalysisJob)
    folder = run_analysis(job)
    printed = capsys.readouterr().out
    assert "most similar layer of zoo/teacher" in printed and str(folder) in printed
    data = json.loads((folder / "data.json").read_text())
    inputs = load_figure_inputs(job)
    models = [load_model(model.path, dtype=model.dtype) for model in inputs.models]
    expected = FIGURES[job.figure].measure(job, inputs, models)
    for panel, wanted in zip(data["panels"], expected["panels"], strict=True):
        for row, wanted_row in zip(panel["exact"], wanted["exact"], strict=True):
            assert row == pytest.approx(wanted_row, abs=1e-5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["sha256"]) == {"figure.png", "data.json"}
    client = MlflowClient(tracking_uri=job.tracking_uri)
    [run] = client.search_runs([client.get_experiment_by_name("semalign").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["figure"] == "similarity"
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"figure.png", "data.json"}
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert cli.main(["analyze", "--plan", *overrides]) == 0
    assert f"{folder}, cached" in capsys.readouterr().out
    assert run_analysis(job) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == times
    assert len(client.search_runs([run.info.experiment_id])) == 1
