"""An alignment loss of one's own in one file: the squared error to the mapped target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from semalign import register_objective
from semalign.core.losses import OBJECTIVES, Objective
from tests.extending.check import listed, made, planned, swept


def squared_error(
    h: torch.Tensor, target: torch.Tensor, lengths: list[int], heads: None
) -> torch.Tensor:
    """Sum over rows of the mean squared difference."""
    return (h.float() - target).square().mean(dim=-1).sum()


if __name__ == Path(__file__).stem:  # as a plugin
    register_objective("mse", Objective(squared_error, "squared error to the mapped target"))


def test_it_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "squared error to the mapped target" in listed("objectives", __file__, capsys)
    assert OBJECTIVES["mse"].uses_map


def test_it_is_planned_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "align" in planned(__file__, "loss.objective=mse", capsys=capsys)
    manifest = made(tmp_path, __file__, "loss.objective=mse")
    folder = next((tmp_path / "transfers").glob(f"*-{manifest['key']}"))
    history = json.loads((folder / "history.json").read_text())
    assert len(history["mse_loss"]) == 1 and history["mse_loss"][0] > 0


def test_it_is_swept(tmp_path: Path) -> None:
    assert swept(tmp_path, __file__, "loss.objective: [cosine, mse]") == 2
