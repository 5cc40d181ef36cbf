"""Deaths by kill -9 of this test's own processes, and an MLflow server that can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil


def wait_for(condition: Callable[[], object], *, timeout: float = 900) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what the test waits for did not come")
        time.sleep(0.01)


def copy_shared(work: Path, to: Path) -> None:
    """What the trials of a sweep share, made before: a death among the trials is the matter."""
    for name in ("attributions", "activations", "bases", "maps"):
        shutil.copytree(work / name, to / name, dirs_exist_ok=True)


def kill(title: str) -> None:
    """Kill -9 the newest process below this one with a title that starts so."""
    below = psutil.Process().children(recursive=True)
    for process in sorted(below, key=psutil.Process.create_time, reverse=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                process.kill()
                return
        except psutil.NoSuchProcess:
            continue
    raise AssertionError(f"no process {title}")


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill -9 a process and all below it, a whole Ray cluster of its own."""
    top = psutil.Process(process.pid)
    for each in [top, *top.children(recursive=True)]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


@contextmanager
def when(condition: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """Act during the block once the condition holds; an error if it never did."""
    errors: list[BaseException] = []

    def watch() -> None:
        try:
            wait_for(condition)
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join(timeout=5)
    assert not thread.is_alive(), "the time to act did not come"
    if errors:
        raise errors[0]


class MlflowServer:
    """A real `mlflow server` on the loopback interface, over a sqlite file."""

    def __init__(self, folder: Path, database: str = "server.db") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.folder, self.database = folder, database
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        where += ["--backend-store-uri", f"sqlite:///{self.folder / self.database}"]
        where += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *where],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # seven processes
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._answers)

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.uri}/health", timeout=5):
                return True
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
