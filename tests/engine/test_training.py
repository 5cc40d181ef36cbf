"""Ray Train: workers agree, killed ones are replaced, a driver goes on, NaN stops the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from semalign.config.jobs import Config
from semalign.engine.steps import Steps
from semalign.errors import Diverged
from semalign.stages.inputs import load_inputs
from semalign.stages.prepare import build_tail
from semalign.stages.training import Epoch
from semalign.stages.training import train as fit_alone
from tests.engine.faults import kill, when


def train(config: Config) -> dict:
    """Manifest and history of a transfer up to its adapter."""
    steps = Steps(config, load_inputs(config))
    pairs = steps.pair(steps.attribute())
    folder = steps.train(steps.job(pairs, steps.extract(pairs), steps.align()), None)
    files = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("manifest", "history")
    }
    return {**files, "folder": folder}


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict:
    from tests.engine.conftest import configure

    make = configure.__wrapped__(family, tmp_path_factory.mktemp("undisturbed"))
    return train(make())


def test_two_workers_have_the_same_loss_curve(
    undisturbed: dict, configure: Callable[..., Config]
) -> None:
    two = train(configure("training.num_workers=2"))
    assert set(two["history"]) == {"loss", "lr", "cosine_loss", "cross_entropy"}
    for name, values in undisturbed["history"].items():
        assert two["history"][name] == pytest.approx(values, abs=1e-4)
    assert len(two["history"]["loss"]) == 4 * 6


def test_alignment_alone_on_two_workers(
    ray_cluster: None, configure: Callable[..., Config]
) -> None:
    """Of the attention: the MLP's adapters get no gradient, and no worker waits for it."""
    config = configure(
        "loss.alpha=1", "loss.beta=0", "extraction.interface=attn", "training.epochs=1",
        "pairing.strategy=last", "training.num_workers=2",
    )  # fmt: skip
    steps = Steps(config, load_inputs(config))
    pairs = steps.pair([0.0] * 5)
    job = steps.job(pairs, steps.extract(pairs), steps.align())
    history = json.loads((steps.train(job, None) / "history.json").read_text())
    tail = build_tail(job, steps.inputs.train, torch.device("cpu"))
    alone: list[Epoch] = []
    fit_alone(tail, job.settings, on_epoch=lambda measured, save: alone.append(measured))
    assert set(history) == {"loss", "lr", "cosine_loss"}
    for name, values in alone[0].series.items():
        assert history[name] == pytest.approx(values, abs=1e-5)


def test_a_killed_worker_ends_in_the_same_adapter(
    undisturbed: dict, configure: Callable[..., Config]
) -> None:
    config = configure()
    training = config.work / "training"
    with when(
        lambda: any(training.glob("*/checkpoint_*/state.pt")), lambda: kill("ray::RayTrainWorker")
    ):
        killed = train(config)
    assert killed["manifest"]["sha256"] == undisturbed["manifest"]["sha256"]
    assert killed["history"] == undisturbed["history"]


DRIVER = """
import sys
from semalign.config.sections import resolve
from semalign.engine.cluster import connect
from tests.engine.test_training import train
with connect(None, num_cpus=2):
    print(train(resolve([], sys.argv[1:]))["manifest"]["sha256"])
"""


def test_a_killed_driver_goes_on_where_it_was(
    undisturbed: dict, configure: Callable[..., Config], tmp_path: Path
) -> None:
    config = configure()
    overrides = [
        f"{key}={value}"
        for key, value in (
            ("teacher", config.teacher),
            ("student", config.student),
            ("workdir", config.workdir),
            ("data.train_limit", 96),
            ("extraction.shard_examples", 16),
            ("training.batch_size", 16),
            ("training.micro_batch_size", 8),
            ("training.epochs", 4),
            ("training.lr", 1e-2),
        )
    ]
    command = [sys.executable, "-c", DRIVER, *overrides]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    first = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 180
    while not any((config.work / "training").glob("*/checkpoint_*/state.pt")):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not list((config.work / "transfers").glob("*/manifest.json"))
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert second.stdout.strip().splitlines()[-1] == undisturbed["manifest"]["sha256"]


def test_a_loss_that_is_not_finite_stops_the_run(
    ray_cluster: None, configure: Callable[..., Config]
) -> None:
    config = configure("training.lr=1e-3")
    steps = Steps(config, load_inputs(config))
    pairs = steps.pair(steps.attribute())
    stores = steps.extract(pairs)
    transport = steps.align()
    weights = load_file(transport)
    weights["matrix"][0, 0] = torch.nan
    save_file(weights, str(transport), {"normalise": "1", "top_k": "0"})
    with pytest.raises(
        Diverged, match=r"loss is nan at step 1; examples .*last good checkpoint: none"
    ):
        steps.train(steps.job(pairs, stores, transport), None)
