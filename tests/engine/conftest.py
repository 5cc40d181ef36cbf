"""A transfer of the random family on few examples, step by step; engines for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from semalign.config.jobs import Config
from semalign.config.read import resolve
from semalign.engine.serving import Engines


@pytest.fixture(scope="session")
def engines(ray_cluster: None) -> Iterator[Engines]:
    """What tests of something else than an engine's start score by: each starts once a session."""
    with Engines() as running:
        yield running


@pytest.fixture
def configure(family: dict[str, Path], tmp_path: Path) -> Callable[..., Config]:
    def make(*overrides: str) -> Config:
        return resolve(
            [],
            [
                f"teacher={family['teacher']}",
                f"student={family['student']}",
                f"workdir={tmp_path / 'work'}",
                "data.train_limit=96",
                "extraction.shard_examples=16",
                "training.batch_size=16",
                "training.micro_batch_size=8",
                "training.epochs=4",
                "training.lr=1e-2",
                *overrides,
            ],
        )

    return make
