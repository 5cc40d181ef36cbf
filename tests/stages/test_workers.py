"""Two processes under DistributedDataParallel measure and learn what one does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from semalign.artifacts.artifact import Workspace
from semalign.models.adapters import trainable_state
from semalign.stages.training import Epoch, train
from semalign.stages.update import Update, supervised_student
from tests.stages.conftest import with_loss

LOSSES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "fisher": {"objective": "fisher", "alpha": 1e6, "gamma": 0.5},
    "geometry": {"objective": "geometry", "gamma": 0.5, "beta": 0.0},
}


def run(update: Update, workspace: Workspace, rank: int, world_size: int) -> dict[str, Any]:
    """Series of all epochs, and the trained weights."""
    student = supervised_student(update, workspace, torch.device("cpu"))
    wrapped = nn.parallel.DistributedDataParallel(student) if world_size > 1 else student
    epochs: list[Epoch] = []
    train(
        wrapped,
        update.training,
        update.seed,
        on_epoch=lambda measured, save: epochs.append(measured),
        rank=rank,
        world_size=world_size,
    )
    series = {name: [v for e in epochs for v in e.series[name]] for name in epochs[0].series}
    return {"series": series, "weights": trainable_state(student.model)}


def work(rank: int, updates: dict[str, Update], workspace: Workspace, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    found = {name: run(update, workspace, rank, 2) for name, update in updates.items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_are_one(update: Update, workspace: Workspace, tmp_path: Path) -> None:
    """Two of ten examples have labels, so that a batch, and parts of the others, have none."""
    updates = {
        name: replace(with_loss(update, **loss), labelled=2) for name, loss in LOSSES.items()
    }
    torch.multiprocessing.spawn(work, (updates, workspace, tmp_path), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, one in updates.items():
        alone = run(one, workspace, 0, 1)
        for found in both:
            for series, values in alone["series"].items():
                assert found[name]["series"][series] == pytest.approx(values, rel=1e-4, nan_ok=True)
            for key, value in alone["weights"].items():
                torch.testing.assert_close(found[name]["weights"][key], value, atol=2e-4, rtol=1e-3)
    assert sum(map(math.isnan, both[0]["cosine"]["series"]["cross_entropy"])) == 3
