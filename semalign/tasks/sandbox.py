"""Runs one untrusted program and its tests, isolated, within limits, and says whether they passed.

Tiers, strongest first. The probe really tries them and every verdict carries its tier.

    1   namespaces of its own (mounts, processes, network, ipc, hostname), a read-only root that
        shows only Python and its libraries, another uid, no capabilities, resource limits
    3   resource limits, an empty environment and a scratch folder; files and network stay open

A pass is a random secret that arrives on a private pipe after the last test (see harness.py).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import marshal
import math
import os
import random
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from semalign.errors import UserError

logger = logging.getLogger(__name__)

STRONGEST, WEAKEST = 1, 3
_HARNESS = Path(__file__).with_name("harness.py").read_text(encoding="utf-8")
_PYTHON = Path(sys.executable).resolve()  # outside any virtual environment
_START_LIMIT_S = 60.0  # for the machine, not the program, whose own clock starts with "ready"
_MESSAGE_LIMIT = 4096
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64")

# What the probe of tier 1 runs: nothing of this machine's own is to be seen.
_PROOF = """
import os, socket
assert set(os.listdir("/")) <= {shown}, os.listdir("/")
assert os.listdir("/dev") == ["null"] and os.listdir("/tmp") == []
assert socket.if_nameindex() in ([], [(1, "lo")])
"""


class SandboxError(RuntimeError):
    """The sandbox itself failed; says nothing about the program."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``passed`` is true only when every test ran to its end; ``seconds`` is wall-clock time."""

    passed: bool
    reason: str
    seconds: float
    tier: int


@dataclass(frozen=True)
class _Launcher:
    tier: int
    namespaces: tuple[str, ...] = ()  # options of unshare; none in tier 3
    identity: str = ""  # options of setpriv


def run(
    program: str,
    *,
    timeout_s: float = 3.0,
    memory_mb: int = 512,
    processes: int = 8,
    file_mb: int = 8,
    min_tier: int = WEAKEST,
) -> Verdict:
    """Runs ``program``, whose tests raise when they fail, and kills whatever it started.

    ``timeout_s`` bounds the wall-clock time of the program, and with it CPU seconds;
    ``memory_mb`` the address space of each process (interpreter included), ``processes`` their
    number, ``file_mb`` each file. Raises UserError when the machine cannot reach ``min_tier``.
    """
    require_tier(min_tier)
    limits = {
        "RLIMIT_AS": memory_mb * 2**20,
        "RLIMIT_CPU": math.ceil(timeout_s) + 1,
        "RLIMIT_FSIZE": file_mb * 2**20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": processes,
    }
    return _run(_launcher(), program, timeout_s, limits)


def require_tier(min_tier: int) -> int:
    """The tier of this machine; UserError when it is weaker than ``min_tier``."""
    if not STRONGEST <= min_tier <= WEAKEST:
        raise UserError(f"sandbox.min_tier: expected {STRONGEST} to {WEAKEST}, found {min_tier}")
    tier = probe_tier()
    if tier > min_tier:
        raise UserError(
            f"sandbox.min_tier={min_tier}: this machine reaches only tier {tier}, because "
            "namespaces cannot be made (needs root, or user namespaces, with util-linux)"
        )
    return tier


def probe_tier() -> int:
    """The strongest tier that works here, found by running programs in it; cached."""
    return _launcher().tier


@functools.cache
def _launcher() -> _Launcher:
    spaces = ("--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child")
    root = _Launcher(1, spaces, "--reuid {uid} --regid {uid} --clear-groups")
    user = _Launcher(1, ("--user", "--map-root-user", *spaces))
    candidates = (root, user) if os.geteuid() == 0 else (user,)
    limits = {"RLIMIT_CPU": 10, "RLIMIT_NPROC": 8}
    if all(map(shutil.which, ("unshare", "setpriv", "mount", "chroot", "sh"))):
        for launcher in candidates:
            try:
                shown = {"dev", "tmp"} | {path.parts[1] for path in _shown()}
                verdict = _run(launcher, _PROOF.format(shown=shown), 10.0, limits)
            except SandboxError as error:
                logger.debug("%s", error)
                continue
            if verdict.passed:
                return launcher
            logger.debug("sandbox tier 1 is leaky: %s", verdict.reason)
    logger.warning(
        "sandbox: TIER 3 ONLY, generated code runs with resource limits but can reach files and "
        "the network (namespaces need root, or user namespaces, with util-linux)"
    )
    return _Launcher(WEAKEST)


def _run(launcher: _Launcher, program: str, timeout_s: float, limits: dict[str, int]) -> Verdict:
    secret = secrets.token_hex(16)
    receive, send = os.pipe()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(os.close, receive)
        with contextlib.ExitStack() as ours:
            ours.callback(os.close, send)
            scratch = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="semalign-"))
            file = cleanup.enter_context(tempfile.TemporaryFile())
            request = {"program": program, "secret": secret, "channel": send, "limits": limits}
            request |= _place(launcher, scratch)
            file.write(marshal.dumps(request))
            file.seek(0)
            errors = cleanup.enter_context(tempfile.TemporaryFile())
            process = _start(launcher, stdin=file.fileno(), stderr=errors.fileno(), channel=send)
        cleanup.callback(_kill, process, receive)
        if _receive(receive, b"ready\n", _START_LIMIT_S) != b"ready":
            errors.seek(0)
            why = errors.read()[-500:].decode("utf-8", "replace")
            raise SandboxError(f"the sandbox (tier {launcher.tier}) did not start: {why}")
        file.truncate(0)  # the request, secret included, is gone from disk
        begin = time.monotonic()
        line = _receive(receive, b"\n", timeout_s)
        seconds = time.monotonic() - begin
    return Verdict(
        passed=line == secret.encode(),
        reason=_reason(line, secret, timeout_s),
        seconds=seconds,
        tier=launcher.tier,
    )


def _place(launcher: _Launcher, scratch: str) -> dict[str, object]:
    """Where the program runs and, in tier 3 as root, as whom."""
    if launcher.namespaces:
        return {"folder": "/tmp", "uid": 0}
    reachable = all(folder.stat().st_mode & 0o001 for folder in _PYTHON.parents)
    uid = _random_uid() if os.geteuid() == 0 and reachable else 0
    Path(scratch).chmod(0o777 if uid else 0o700)
    return {"folder": scratch, "uid": uid}


def _start(
    launcher: _Launcher, *, stdin: int, stderr: int, channel: int
) -> subprocess.Popen[bytes]:
    command = [str(_PYTHON), "-I", "-S", "-B", "-c", _HARNESS]
    if launcher.namespaces:
        setpriv, unshare = _tool("setpriv"), _tool("unshare")
        identity = launcher.identity.format(uid=_random_uid())
        enter = ["sh", "-c", _enter_script(), "sh", identity, _HARNESS]
        # Dies with us, even when we are killed; so does, through --kill-child, the namespace.
        command = [setpriv, "--pdeathsig", "KILL", unshare, *launcher.namespaces, *enter]
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=(channel,),
        env={},
        cwd="/",
        start_new_session=True,
    )


@functools.cache
def _enter_script() -> str:
    """The shell script that makes the new root and runs Python in it; $1 identity, $2 harness.

    The shell stays process 1 of the namespace: when the program ends, or the shell is killed, all
    that the program started ends too. The new root is mounted over /proc, a folder that every
    system has and the program must not see.
    """
    links = [path for path in _shown() if path.is_symlink()]  # such as /lib -> usr/lib
    folders = [path for path in _shown() if path.is_dir() and path not in links]
    files = [path for path in _shown() if path not in links + folders]
    parents = [path if path in folders else path.parent for path in _shown()]
    command = [_tool("setpriv"), "$1", "--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all"]
    command += ["--bounding-set=-all", str(_PYTHON), "-I", "-S", "-B", "-c", '"$2"']
    return "\n".join(
        [
            "set -e",
            "mount -t tmpfs -o mode=755,size=1m root /proc",
            "cd /proc",
            "mkdir -p dev tmp " + " ".join(quote(f".{parent}") for parent in parents),
            *(f": > {quote(f'.{file}')}" for file in [Path("/dev/null"), *files]),
            *(f"ln -s {quote(str(link.readlink()))} {quote(f'.{link}')}" for link in links),
            "mount --bind /dev/null dev/null",
            *(
                f"mount --bind -o ro,nosuid,nodev {quote(str(path))} {quote(f'.{path}')}"
                for path in folders + files
            ),
            "mount -t tmpfs -o mode=1777,size=16m,nosuid,nodev scratch tmp",
            "mount -o remount,ro,nosuid /proc",
            "chroot . " + " ".join(command),
            "exit 0",
        ]
    )


@functools.cache
def _shown() -> tuple[Path, ...]:
    """What of the file system the program may read: Python, its libraries, setpriv."""
    prefix = Path(sys.base_prefix).resolve()
    python = _PYTHON if prefix in (Path("/usr"), Path("/")) else prefix
    libraries = [Path(path) for path in _LIBRARIES if Path(path).exists()]
    return (*libraries, Path(_tool("setpriv")), python)


def _tool(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, "the probe has seen it"
    return str(Path(path).resolve())


def _random_uid() -> int:
    # A uid a run: limits on processes count per uid, and runs must not signal one another.
    return random.SystemRandom().randrange(20_000, 60_000)


def _receive(channel: int, end: bytes, limit_s: float) -> bytes | None:
    """One message without its line end; what came before the writers died; None after the limit."""
    deadline = time.monotonic() + limit_s
    data = b""
    while not data.endswith(end) and len(data) < _MESSAGE_LIMIT:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([channel], [], [], left)[0]:
            return None
        # Byte by byte, so that nothing of the next message is taken.
        if not (byte := os.read(channel, 1)):
            break
        data += byte
    return data.removesuffix(b"\n")


def _reason(line: bytes | None, secret: str, timeout_s: float) -> str:
    if line is None:
        return f"timed out after {timeout_s:g} s"
    if line == secret.encode():
        return "passed"
    text = line.decode("utf-8", "replace")
    return text.removeprefix("error ") if text.startswith("error ") else "ended before its tests"


def _kill(process: subprocess.Popen[bytes], channel: int) -> None:
    """Ends the whole tree and waits until nothing holds the channel."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and select.select([channel], [], [], 0.1)[0]:
        if not os.read(channel, _MESSAGE_LIMIT):
            break
