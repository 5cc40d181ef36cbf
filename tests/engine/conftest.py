"""A transfer of the random family on few examples, step by step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from semalign.config import Config, resolve


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


def kill_when(
    condition: Callable[[], bool], process: str, *, timeout: float = 120
) -> threading.Thread:
    """Kill -9 the first process whose title starts with `process`, once `condition` holds."""

    def watch() -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if condition():
                for found in psutil.process_iter(["cmdline"]):
                    if " ".join(found.info["cmdline"] or []).startswith(process):
                        os.kill(found.pid, signal.SIGKILL)
                        return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread
