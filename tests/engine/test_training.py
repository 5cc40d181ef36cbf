"""Trainings in the driver's process and by Ray Train: workers agree, killed ones are replaced, a
driver goes on, NaN stops the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from semalign.artifacts.artifact import Workspace
from semalign.artifacts.local import make_all
from semalign.config.jobs import Config
from semalign.engine.executor import RayExecutor
from semalign.engine.transfer import make
from semalign.errors import Diverged
from semalign.methods.method import Transfer
from semalign.stages.mapping import Map
from semalign.stages.training import Epoch
from semalign.stages.training import train as fit_alone
from semalign.stages.update import Update, supervised_student
from tests.engine.faults import kill, when

Trained = dict[str, Any]


def train(config: Config) -> Trained:
    """Manifest and history of a transfer up to its adapter."""
    prepared = Transfer.of(config)
    with RayExecutor(prepared.config, Workspace(config.work)) as executor:
        recipe = make(prepared, executor)
    folder = executor.workspace.place(recipe.result)
    files = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("manifest", "history")
    }
    return {**files, "folder": folder, "update": recipe.result}


def checkpoints(work: Path) -> list[Path]:
    return list(work.glob("unfinished/training-*/checkpoint_*/state.pt"))


def fresh(
    family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, *overrides: str
) -> Trained:
    from tests.engine.conftest import configure

    make_config = configure.__wrapped__(family, tmp_path_factory.mktemp("undisturbed"))
    return train(make_config(*overrides))


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """In the driver's process."""
    return fresh(family, tmp_path_factory)


@pytest.fixture(scope="module")
def two(
    ray_cluster: None, family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """By two workers of Ray Train."""
    return fresh(family, tmp_path_factory, "training.num_workers=2")


def test_two_workers_have_the_same_loss_curve(undisturbed: Trained, two: Trained) -> None:
    assert set(two["history"]) == {"loss", "lr", "cosine_loss", "cross_entropy"}
    for name, values in undisturbed["history"].items():
        assert two["history"][name] == pytest.approx(values, abs=1e-4)
    assert len(two["history"]["loss"]) == 4 * 6


def test_checkpoints_go_with_the_training_that_needed_them(
    undisturbed: Trained, two: Trained
) -> None:
    for made in (undisturbed, two):
        work = made["folder"].parents[1]
        assert not checkpoints(work) and not list(work.glob("unfinished/training-*/"))
        assert made["manifest"]["epochs"] == 4


def test_alignment_alone_on_two_workers(
    ray_cluster: None, configure: Callable[..., Config]
) -> None:
    """Of the attention: the MLP's adapters get no gradient, and no worker waits for it."""
    config = configure(
        "loss.alpha=1", "loss.beta=0", "extraction.interface=attn", "training.epochs=1",
        "pairing.strategy=last", "training.num_workers=2",
    )  # fmt: skip
    made = train(config)
    update: Update = made["update"]
    student = supervised_student(update, Workspace(config.work), torch.device("cpu"))
    alone: list[Epoch] = []
    fit_alone(
        student,
        update.training,
        update.seed,
        on_epoch=lambda measured, save: alone.append(measured),
    )
    assert set(made["history"]) == {"loss", "lr", "cosine_loss"}
    for name, values in alone[0].series.items():
        assert made["history"][name] == pytest.approx(values, abs=1e-5)


def test_a_killed_worker_ends_in_the_same_adapter(
    two: Trained, configure: Callable[..., Config]
) -> None:
    config = configure("training.num_workers=2")
    with when(lambda: checkpoints(config.work), lambda: kill("ray::RayTrainWorker")):
        killed = train(config)
    assert killed["manifest"]["sha256"] == two["manifest"]["sha256"]
    assert killed["history"] == two["history"]


DRIVER = """
import sys
from semalign.config.read import resolve
from semalign.engine.cluster import connect
from tests.engine.test_training import train
with connect(None, num_cpus=2):
    print(train(resolve([], sys.argv[1:]))["manifest"]["sha256"])
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_driver_goes_on_where_it_was(
    undisturbed: Trained, two: Trained, configure: Callable[..., Config], workers: int
) -> None:
    """With one worker the training is in the driver's own process, with two in Ray Train's."""
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
            ("training.num_workers", workers),
        )
    ]
    command = [sys.executable, "-c", DRIVER, *overrides]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"  # how soon a checkpoint is noted
    first = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 180
    while not (noted(config.work) if workers > 1 else checkpoints(config.work)):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not list((config.work / "transfers").glob("*/manifest.json"))
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = undisturbed if workers == 1 else two
    assert second.stdout.strip().splitlines()[-1] == expected["manifest"]["sha256"]
    assert "epoch 4: " in second.stderr and "epoch 1: " not in second.stderr


def noted(work: Path) -> bool:
    """Whether Ray Train has noted a checkpoint, to resume from."""
    notes = list(work.glob("unfinished/training-*/checkpoint_manager_snapshot.json"))
    return any("checkpoint_" in file.read_text(encoding="utf-8") for file in notes)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(
    ray_cluster: None, configure: Callable[..., Config], workers: int
) -> None:
    config = configure("training.lr=1e-3", f"training.num_workers={workers}")
    prepared = Transfer.of(config)
    with RayExecutor(prepared.config, Workspace(config.work)) as executor:
        make_all(executor, prepared.first)
        recipe = prepared.recipe(executor.workspace)
        make_all(executor, recipe.artifacts[:-1])
        [mapping] = [artifact for artifact in recipe.artifacts if isinstance(artifact, Map)]
        transport = executor.workspace.place(mapping) / "map.safetensors"
        weights = load_file(transport)
        weights["matrix"][0, 0] = torch.nan
        save_file(weights, str(transport), {"normalise": "1", "top_k": "0"})
        with pytest.raises(
            Diverged, match=r"loss is nan at step 1; examples .*last good checkpoint: none"
        ):
            executor.make(recipe.result)
