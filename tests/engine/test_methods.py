"""All methods in one sweep: each trains and is scored from what it saved, next to the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
from mlflow import MlflowClient

from semalign.config.read import resolve
from semalign.engine.scoring import transferred
from semalign.engine.serving import Engines
from semalign.engine.tuning import ablate
from semalign.methods.method import Transfer
from semalign.report import comparison
from semalign.sweep.file import load_sweep
from semalign.sweep.summary import Summary

METHODS = ("semalign", "seeking", "laten", "sft", "sft-all", "logit-kd")
SWEEP = f"""
base:
  method: sft
  data: {{train_limit: 32}}
  training: {{epochs: 1, batch_size: 16, lr: 1.0e-3}}
  evaluation: {{tasks: [mmlu], splits: [test]}}
axes:
  method: [{", ".join(METHODS)}]
compare: {{axis: method, control: sft}}
"""


@dataclass
class Done:
    summary: Summary
    printed: str
    work: Path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, engines: Engines) -> Iterator[Done]:
    folder = tmp_path_factory.mktemp("methods")
    (folder / "all.yaml").write_text(SWEEP)
    with redirect_stdout(StringIO()) as printed:
        sweep = load_sweep(folder / "all.yaml", [f"workdir={folder / 'work'}"])
        summary = ablate(sweep, engines=engines)
    yield Done(summary, printed.getvalue(), folder / "work")


def test_every_method_ends_with_a_score(done: Done) -> None:
    assert [r.trial.config.method for r in done.summary.results] == list(METHODS)
    for result in done.summary.results:
        assert result.state == "finished", (result.trial.label, result.error)
        assert len(result.items["mmlu", "test"]) == 400


def test_what_is_trained_is_counted(done: Done) -> None:
    trained = {r.trial.config.method: r.cost["trained_parameters"] for r in done.summary.results}
    assert trained["sft"] == trained["logit-kd"] == trained["semalign"]
    assert trained["sft-all"] == 4 * trained["sft"]
    assert trained["laten"] == 4 * 192 * (192 + 128)
    assert all(result.cost["peak_bytes"] > 1e8 for result in done.summary.results)


def test_the_tables_set_them_side_by_side(done: Done) -> None:
    head, body = comparison.Tables(done.summary).scores()
    assert head == ["test", "mmlu", "mean gap"]
    names = [row[0] for row in body]
    assert names == ["student zoo/student", "teacher zoo/teacher", *METHODS]
    _, differences = comparison.Tables(done.summary).differences()
    assert [row[0] for row in differences] == [m for m in METHODS if m != "sft"]
    [report] = done.work.glob("sweeps/*/report.md")
    assert "Against the control" in report.read_text()
    assert done.printed.count("[seek]") == 1


def test_mlflow_has_a_run_for_each(done: Done) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{done.work / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("semalign")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    children = {r.data.tags["method"]: r for r in found if "method" in r.data.tags}
    assert set(children) == set(METHODS)
    for run in children.values():
        assert run.info.status == "FINISHED"
        assert run.data.metrics["cost/trained_parameters"] > 0
        assert "test/mmlu/transferred" in run.data.metrics


def test_latens_student_is_run_in_float32(done: Done) -> None:
    """Its deltas are too small for bfloat16; what is an adapter runs as the others do."""
    candidates = {}
    for method in ("laten", "sft-all"):
        [folder] = done.work.glob(f"transfers/mmlu-{method}-*")
        config = resolve([], [f"method={method}", "dtype=bfloat16", f"workdir={done.work}"])
        candidates[method] = transferred(Transfer.of(config), folder)
    assert {method: found.model.dtype for method, found in candidates.items()} == {
        "laten": "float32",
        "sft-all": "bfloat16",
    }
    assert candidates["laten"].adapter is None and candidates["sft-all"].adapter is not None
