"""Starts the processes inside the sandbox, restricts them, and ends all of them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import marshal
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semalign.sandbox.isolation import landlock_ruleset, syscall_filter
from semalign.sandbox.root import PYTHON, enter_script, found_tool, tool, visible

STRONGEST, WEAKEST = 1, 3  # tiers, see run.py
_START_LIMIT_S = 60.0  # for the machine, not the program, whose own clock starts with "ready"
_END_LIMIT_S = 1.0
_LINE_LIMIT = 4096
_OUR_CALLS = 64  # threads of the same user that may start while a program runs, see _processes

# What goes into the sandbox: these modules, compiled here, and settings on standard input.
_INSIDE = ("wire", "solution", "checker", "harness", "server")
_BOOT = """
import marshal, sys
modules, settings = marshal.load(sys.stdin.buffer)
for name, code in modules:
    module = sys.modules[name] = type(sys)(name)
    exec(code, vars(module))
module.fork_programs(settings)
"""


class SandboxError(RuntimeError):
    """The sandbox itself failed, which is no verdict on the program."""


@dataclass(frozen=True)
class Launcher:
    """A way to start the sandbox in one tier."""

    tier: int
    namespaces: tuple[str, ...] = ()  # options of unshare; in tier 1 only
    changes_user: bool = False  # of tier 1: each program has a user id of its own

    @property
    def rules(self) -> bool:
        """Whether the kernel filters system calls and guards files: in every tier but the third."""
        return self.tier < WEAKEST


def in_namespaces() -> list[Launcher]:
    """The launchers into namespaces that may work on this machine."""
    if not all(map(found_tool, ("unshare", "mount", "chroot", "sh"))):
        return []
    spaces = ("--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child")
    user = [Launcher(1, ("--user", "--map-root-user", *spaces))]
    root = [Launcher(1, spaces, changes_user=True)]
    return root + user if os.geteuid() == 0 else user


class _Server:
    """A process inside the sandbox that starts the processes of programs, one at a time."""

    def __init__(self, launcher: Launcher) -> None:
        with contextlib.ExitStack() as handed:  # closed here as soon as they are inherited
            self.control, theirs = socket.socketpair()
            fds = [handed.enter_context(theirs).fileno()]
            file = handed.enter_context(tempfile.TemporaryFile())
            errors = handed.enter_context(tempfile.TemporaryFile())
            ruleset = handed.enter_context(_ruleset(launcher))
            fds += [] if ruleset is None else [ruleset]
            settings = {
                "namespaces": bool(launcher.namespaces),
                "control": theirs.fileno(),
                "ruleset": ruleset,
                "filter": _filter(launcher),
            }
            file.write(marshal.dumps((_inside(), settings)))
            file.seek(0)
            self.process = _start(launcher, file.fileno(), errors.fileno(), fds)
            theirs.close()  # or its end would not be seen
            if self._line(_START_LIMIT_S) != b"ready":
                self.close()
                errors.seek(0)
                why = errors.read()[-500:].decode("utf-8", "replace")
                raise SandboxError(f"the sandbox (tier {launcher.tier}) did not start: {why}")

    def start(self, request: dict[str, Any]) -> tuple[socket.socket, int]:
        """Start a program: the channel to its checker, and the leash that ends it.

        Raises SandboxError, and closes the server, where the program does not start.
        """
        channel, theirs = socket.socketpair()
        end, leash = os.pipe()
        line = b""
        try:
            with theirs, contextlib.suppress(OSError):  # the server may be dead
                socket.send_fds(self.control, [b"."], [theirs.fileno(), end])
            with contextlib.suppress(OSError):  # TimeoutError is one
                channel.settimeout(_START_LIMIT_S)
                channel.sendall(framed(marshal.dumps(request)))
                line = receive_line(channel, time.monotonic() + _START_LIMIT_S)
        finally:
            os.close(end)
        if line == b"ready":
            return channel, leash
        channel.close()
        os.close(leash)
        self.close()
        why = line.removeprefix(b"failed ").decode("utf-8", "replace")
        raise SandboxError(f"the sandbox did not start a program: {why}")

    def program_ended(self) -> bool:
        """Whether all processes of the program have ended, for which it waits a moment."""
        return self._line(_END_LIMIT_S) == b"."

    def close(self) -> None:
        """End the server and all that it has started."""
        self.control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _line(self, limit_s: float) -> bytes:
        with contextlib.suppress(TimeoutError):
            return receive_line(self.control, time.monotonic() + limit_s)
        return b""


_idle: dict[Launcher, list[_Server]] = {}  # that started, and serve the next programs


@contextlib.contextmanager
def started(
    launcher: Launcher, solution: str, limits: dict[str, int], processes: int
) -> Iterator[socket.socket]:
    """The channel to the checker, once it runs; on exit all processes have ended."""
    with contextlib.ExitStack() as cleanup:
        request = {"solution": solution, "limits": limits, **_place(launcher, cleanup)}
        request["processes"] = _processes(launcher, processes)
        server, channel, leash = _start_program(launcher, request)
        cleanup.enter_context(channel)
        cleanup.callback(_end_program, launcher, server, leash)
        yield channel


def framed(message: bytes) -> bytes:
    """The message as a process inside reads it: its length goes before it."""
    return len(message).to_bytes(8, "big") + message


def close_idle() -> None:
    """End the servers that wait for programs."""
    for servers in _idle.values():
        while servers:
            servers.pop().close()


atexit.register(close_idle)
os.register_at_fork(after_in_child=_idle.clear)  # they answer the process that started them


def _start_program(
    launcher: Launcher, request: dict[str, Any]
) -> tuple[_Server, socket.socket, int]:
    """By a server that is idle, unless it has died meanwhile, or a new one."""
    idle = _idle.setdefault(launcher, [])
    while True:
        try:
            server = idle.pop()
        except IndexError:
            server = _Server(launcher)
            return server, *server.start(request)
        with contextlib.suppress(SandboxError):
            return server, *server.start(request)


def _end_program(launcher: Launcher, server: _Server, leash: int) -> None:
    """End all processes of the program and wait for them."""
    with contextlib.suppress(OSError):  # the server may be dead
        os.write(leash, b".")
    os.close(leash)
    if server.program_ended():
        _idle[launcher].append(server)
    else:
        server.close()


def _ruleset(launcher: Launcher) -> contextlib.AbstractContextManager[int | None]:
    if not launcher.rules:
        return contextlib.nullcontext()
    return landlock_ruleset(None if launcher.namespaces else visible())


@functools.cache
def _inside() -> list[tuple[str, Any]]:
    """The modules of the sandbox's inside, in the order of their imports."""
    here = Path(__file__).parent / "inside"
    texts = [(name, (here / f"{name}.py").read_text(encoding="utf-8")) for name in _INSIDE]
    return [
        (f"semalign.sandbox.inside.{name}", compile(text, name, "exec")) for name, text in texts
    ]


def _filter(launcher: Launcher) -> bytes | None:
    return syscall_filter(namespaces=bool(launcher.namespaces)) if launcher.rules else None


def _processes(launcher: Launcher, processes: int) -> int:
    """The limit on the processes of one user, our own included.

    For an ordinary user without namespaces, the kernel also counts what the user runs already, so
    there the limit stops a fork bomb but is not exact.
    """
    if os.geteuid() == 0 and (launcher.changes_user or not launcher.namespaces):
        return processes + 1  # the checker
    if launcher.namespaces:
        return processes + 3  # and unshare and the server
    running = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError, KeyError):
            fields = dict(line.split(":\t") for line in status.read_text().splitlines())
            if int(fields["Uid"].split()[0]) == os.getuid():
                running += int(fields["Threads"])
    return running + processes + _OUR_CALLS


def _place(launcher: Launcher, cleanup: contextlib.ExitStack) -> dict[str, object]:
    """The folder that the program runs in and, for root without namespaces, its user id."""
    if launcher.namespaces:
        uid = _random_uid() if launcher.changes_user else 0
        return {"folder": "/tmp", "uid": uid, "search": False}
    uid = _random_uid() if os.geteuid() == 0 else 0
    reachable = all(folder.stat().st_mode & 0o001 for folder in PYTHON.parents)
    folder = "/"
    if not launcher.rules:
        scratch = tempfile.TemporaryDirectory(prefix="semalign-", ignore_cleanup_errors=True)
        folder = cleanup.enter_context(scratch)
        Path(folder).chmod(0o777 if uid else 0o700)
    return {"folder": folder, "uid": uid, "search": not reachable}


def _start(
    launcher: Launcher, stdin: int, stderr: int, pass_fds: list[int]
) -> subprocess.Popen[bytes]:
    command = [str(PYTHON), "-I", "-S", "-B", "-c", _BOOT]
    if launcher.namespaces:
        enter = ["sh", "-c", enter_script(), "sh", _BOOT]
        # With unshare, when it is killed, ends the namespace.
        command = [tool("unshare"), *launcher.namespaces, *enter]
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=pass_fds,
        env={},
        cwd="/",
        start_new_session=True,
    )


def _random_uid() -> int:
    # A uid a run: limits on processes count per uid, and runs must not signal one another.
    return random.SystemRandom().randrange(20_000, 60_000)


def receive_line(channel: socket.socket, deadline: float) -> bytes:
    """One line without its newline, or the part that arrived before its writers ended.

    Raises TimeoutError at the deadline.
    """
    data = b""
    while not data.endswith(b"\n") and len(data) < _LINE_LIMIT:
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        channel.settimeout(left)
        try:
            piece = channel.recv(_LINE_LIMIT)
        except ConnectionError:
            piece = b""
        if not piece:
            break
        data += piece
    return data.removesuffix(b"\n")
