"""Two equal runs started at the same second on one new work folder: both end well, one records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from mlflow import MlflowClient

from semalign import zoo

ROOT = Path(__file__).parents[2]
TASK = "gsm8k"
LINES = {"train": 32, "extract": 8, "dev": 8}
STEPS = 2 * 2  # 2 epochs of 32 rows, 16 a step


def test_two_runs_at_once_are_one(tmp_path: Path) -> None:
    """Each on a Ray cluster of its own."""
    data, work = tmp_path / "data", tmp_path / "work"
    (data / TASK).mkdir(parents=True)
    for split, count in LINES.items():
        rows = (zoo.path("zoo/data") / TASK / f"{split}.jsonl").read_text().splitlines()
        (data / TASK / f"{split}.jsonl").write_text("\n".join(rows[:count]) + "\n")
    command = [
        sys.executable,
        "ray_jobs/transfer.py",
        f"workdir={work}",
        f"data.root={data}",
        f"data.task={TASK}",
        f"evaluation.tasks=[{TASK}]",
        "evaluation.splits=[dev]",
        "training.epochs=2",
        "training.batch_size=16",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=500) for process in started]
    for process, (out, error) in zip(started, outputs, strict=True):
        assert process.returncode == 0, out[-3000:] + error[-3000:]
        assert "Traceback" not in error
        for row in ("student", "teacher", "transferred", f"{TASK}* n=8"):
            assert row in out
    waiting = "waiting for another process: the same run, gsm8k-proportional, is under way"
    assert sorted(error.count(waiting) for _, error in outputs) == [0, 1]
    assert sorted("0 items generated" in out for out, _ in outputs) == [False, True]

    client = MlflowClient(tracking_uri=f"sqlite:///{work / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("semalign")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    for name in run.data.metrics:
        steps = Counter(point.step for point in client.get_metric_history(run.info.run_id, name))
        assert set(steps.values()) == {1}, name
        if name.startswith("train/"):
            assert sorted(steps) == list(range(1, STEPS + 1)), name
    table = client.download_artifacts(run.info.run_id, "predictions.json", str(tmp_path))
    columns, rows = (json.loads(Path(table).read_text())[part] for part in ("columns", "data"))
    places = [columns.index(name) for name in ("candidate", "id", "sample")]
    assert Counter(tuple(row[place] for place in places) for row in rows) == Counter(
        (candidate, row_id, 0)
        for candidate in ("student", "teacher", "transferred")
        for row_id in {row[places[1]] for row in rows}
    )
    assert len(rows) == 3 * LINES["dev"]
    for kind in ("transfers", "attributions", "maps"):
        folders = [f for f in (work / kind).iterdir() if f.is_dir() and not f.is_symlink()]
        assert len(folders) == 1, kind
    assert not [f for f in work.rglob(".*") if f.is_dir()]  # nothing half-made
