"""Every way a command can end: a line on stderr, an exit status, and a log of what is not known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from semalign.errors import Failed, UserError, one_line, root_cause

ROOT = Path(__file__).parents[2]


class Wrapped(Exception):
    """As Ray raises what a task raised: of both classes, the task's own as its cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"ray::task()\n  File 'task.py', line 1\n{type(cause).__name__}: {cause}")
        self.cause = cause


@pytest.fixture
def fail(call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command whose engine raises the error; the result has exit_code and stderr."""

    def run(error: BaseException, *words: str, folder: Path = tmp_path) -> Any:
        def raising(*_: Any, **__: Any) -> None:
            raise error

        engine = SimpleNamespace(run_transfer=raising)
        monkeypatch.setitem(sys.modules, "semalign.engine.transfer", engine)
        return call(*words, "transfer", f"workdir={folder}")

    return run


def test_an_unknown_error_is_a_line_and_a_log(fail: Any, tmp_path: Path) -> None:
    done = fail(RuntimeError("shapes differ:\n  (3, 4)\n  (4, 3)"))
    [log] = tmp_path.glob("error-*.log")
    line = f"error: RuntimeError: shapes differ: (3, 4) (4, 3); the traceback is in {log}\n"
    assert (done.exit_code, done.stderr) == (1, line)
    assert "Traceback" in log.read_text() and "in raising" in log.read_text()


def test_without_a_work_folder_the_log_is_a_temporary_file(
    fail: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = fail(KeyError("weights"), folder=tmp_path / "none")
    [log] = tmp_path.glob("error-*.log")
    assert done.stderr == f"error: KeyError: 'weights'; the traceback is in {log}\n"
    assert not (tmp_path / "none").exists()


def test_a_long_message_is_cut(fail: Any) -> None:
    assert len(fail(ValueError("x " * 10_000)).stderr) < 600


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a=1: expected 2"), 2, "a=1: expected 2"),
        (Wrapped(UserError("a=1: expected 2")), 2, "a=1: expected 2"),
        (Wrapped(Wrapped(Failed("it diverged"))), 1, "it diverged"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on where this one was"),
    ],
)
def test_known_endings_leave_no_log(
    error: BaseException, status: int, line: str, fail: Any, tmp_path: Path
) -> None:
    done = fail(error)
    assert (done.exit_code, done.stderr) == (status, f"error: {line}\n")
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" in fail(error, "-v").stderr


def test_what_a_worker_raised_is_found() -> None:
    inner = UserError("x")
    group = RuntimeError("training failed")
    group.worker_failures = {0: RuntimeError("the other rank has gone"), 1: Wrapped(inner)}  # type: ignore[attr-defined]
    assert root_cause(Wrapped(inner)) is inner
    assert root_cause(group) is inner
    assert one_line("a\n b", limit=10) == "a b" and one_line("x" * 20, limit=10) == "x" * 7 + "..."


WAITS = """
import sys, time
from semalign.cli import app, main

@app.command("wait")
def wait() -> None:
    print("waiting", flush=True)
    time.sleep(60)

sys.exit(main(["wait"]))
"""


@pytest.mark.parametrize(
    ("number", "status", "end"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_is_a_line_and_its_status(number: signal.Signals, status: int, end: str) -> None:
    running = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a background job of a shell ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert running.stdout is not None and running.stdout.readline() == "waiting\n"
    running.send_signal(number)
    assert running.communicate()[1] == (
        f"error: {end}; the same command goes on where this one was\n"
    )
    assert running.returncode == status
