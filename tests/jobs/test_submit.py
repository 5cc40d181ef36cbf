"""`ray start --head`, then `ray job submit -- python ray_jobs/transfer.py`: the job succeeds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from semalign import zoo

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
PORT, DASHBOARD = "6479", "8365"
ADDRESS = f"http://127.0.0.1:{DASHBOARD}"


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head node with 3 CPUs, ended with everything it started; yields its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment["RAY_AUTH_MODE"] = "disabled"
    environment["PATH"] = f"{Path(RAY).parent}{os.pathsep}{os.environ['PATH']}"
    command = [RAY, "start", "--head", "--block", "--num-cpus=3", f"--port={PORT}"]
    command += [f"--dashboard-port={DASHBOARD}", "--dashboard-host=127.0.0.1"]
    with (tmp_path / "head.log").open("w") as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 90
        while not _answers(f"{ADDRESS}/api/version"):
            assert node.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline, "the dashboard does not answer"
            time.sleep(0.5)
        yield environment
    finally:
        node.terminate()
        node.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_a_submitted_job_with_two_workers_succeeds(head: dict[str, str], tmp_path: Path) -> None:
    data = tmp_path / "data" / "gsm8k"
    data.mkdir(parents=True)
    for split, count in (("train", 32), ("extract", 8), ("dev", 8), ("test", 8)):
        rows = (zoo.path("zoo/data") / "gsm8k" / f"{split}.jsonl").read_text().splitlines()
        (data / f"{split}.jsonl").write_text("\n".join(rows[:count]) + "\n")
    overrides = [
        f"workdir={tmp_path / 'work'}",
        f"data.root={tmp_path / 'data'}",
        "data.task=gsm8k",
        "evaluation.tasks=[gsm8k]",
        "training.epochs=1",
        "training.num_workers=2",
    ]
    done = subprocess.run(
        [RAY, "job", "submit", "--address", ADDRESS, "--working-dir", ".", "--",
         "python", "ray_jobs/transfer.py", *overrides],
        cwd=ROOT, env=head, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    for words in ("[train] ", "2 worker(s)", "transferred", "gsm8k* n=8", "mlflow ui"):
        assert words in done.stdout
    assert list((tmp_path / "work" / "transfers").glob("*/adapter/adapter_model.safetensors"))
