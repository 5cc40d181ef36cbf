"""Starts the processes inside the sandbox, restricts them, and ends all of them."""

from __future__ import annotations

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
from semalign.sandbox.root import PYTHON, enter_script, found_tool, shown, tool

STRONGEST, WEAKEST = 1, 3  # tiers, see run.py
_START_LIMIT_S = 60.0  # for the machine, not the program, whose own clock starts with "ready"
_LINE_LIMIT = 4096
_OUR_CALLS = 64  # threads of the same user that may start while a program runs, see _processes

# What goes into the sandbox: these modules, compiled here, and a request on standard input.
_INSIDE = ("wire", "solution", "checker", "harness")
_BOOT = """
import marshal, sys
modules, request = marshal.load(sys.stdin.buffer)
for name, code in modules:
    module = sys.modules[name] = type(sys)(name)
    exec(code, vars(module))
module.start_processes(request)
"""


class SandboxError(RuntimeError):
    """The sandbox itself failed, which is no verdict on the program."""


@dataclass(frozen=True)
class Launcher:
    """A way to start the sandbox in one tier."""

    tier: int
    namespaces: tuple[str, ...] = ()  # options of unshare; in tier 1 only
    identity: str = ""  # options of setpriv

    @property
    def rules(self) -> bool:
        """Whether the kernel filters system calls and guards files: in every tier but the third."""
        return self.tier < WEAKEST


def in_namespaces() -> list[Launcher]:
    """The launchers into namespaces that may work on this machine."""
    if not all(map(found_tool, ("unshare", "setpriv", "mount", "chroot", "sh"))):
        return []
    spaces = ("--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child")
    user = [Launcher(1, ("--user", "--map-root-user", *spaces))]
    root = [Launcher(1, spaces, "--reuid {uid} --regid {uid} --clear-groups")]
    return root + user if os.geteuid() == 0 else user


@contextlib.contextmanager
def started(
    launcher: Launcher, solution: str, limits: dict[str, int], processes: int
) -> Iterator[socket.socket]:
    """The channel to the checker, once it runs; on exit all processes have ended."""
    with contextlib.ExitStack() as cleanup:
        channel, theirs = socket.socketpair()
        cleanup.enter_context(channel)
        file = cleanup.enter_context(tempfile.TemporaryFile())
        errors = cleanup.enter_context(tempfile.TemporaryFile())
        with contextlib.ExitStack() as handed:  # closed here as soon as they are inherited
            fds = [handed.enter_context(theirs).fileno()]
            ruleset = handed.enter_context(_ruleset(launcher))
            end = leash = None
            if not launcher.namespaces:
                end, leash = os.pipe()
                handed.callback(os.close, end)
                cleanup.callback(os.close, leash)
            fds += [fd for fd in (ruleset, end) if fd is not None]
            request: dict[str, Any] = {
                "solution": solution,
                "fds": fds,
                "channel": theirs.fileno(),
                "leash": end,
                "limits": limits,
                "processes": _processes(launcher, processes),
                "ruleset": ruleset,
                "filter": _filter(launcher),
            }
            request |= _place(launcher, cleanup)
            file.write(marshal.dumps((_inside(), request)))
            file.seek(0)
            process = _start(launcher, file.fileno(), errors.fileno(), fds)
        cleanup.callback(_kill, process, leash)
        with contextlib.suppress(TimeoutError):
            if receive_line(channel, time.monotonic() + _START_LIMIT_S) == b"ready":
                yield channel
                return
        errors.seek(0)
        why = errors.read()[-500:].decode("utf-8", "replace")
        raise SandboxError(f"the sandbox (tier {launcher.tier}) did not start: {why}")


def _ruleset(launcher: Launcher) -> contextlib.AbstractContextManager[int | None]:
    if not launcher.rules:
        return contextlib.nullcontext()
    return landlock_ruleset(None if launcher.namespaces else shown())


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
    """The limit on the processes of one user, the checker included.

    For an ordinary user without namespaces, the kernel also counts what the user runs already, so
    there the limit stops a fork bomb but is not exact.
    """
    if launcher.namespaces or os.geteuid() == 0:
        return processes + 1
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
        return {"folder": "/tmp", "uid": 0, "search": False}
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
        identity = launcher.identity.format(uid=_random_uid())
        enter = ["sh", "-c", enter_script(), "sh", identity, _BOOT]
        # Dies with us, even when we are killed; so does, through --kill-child, the namespace.
        unshare = [tool("unshare"), *launcher.namespaces]
        command = [tool("setpriv"), "--pdeathsig", "KILL", *unshare, *enter]
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


def _kill(process: subprocess.Popen[bytes], leash: int | None) -> None:
    """End the whole tree and wait for it; its remaining processes are reaped inside."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if leash is None:
            # Only the first process of the namespace: unshare waits for it, and it for the rest.
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            for pid in children.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        else:
            os.write(leash, b".")
        process.wait(1.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
