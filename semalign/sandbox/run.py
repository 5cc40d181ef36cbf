"""Runs one untrusted solution against trusted tests, isolated and within limits.

Two processes: the solution executes the generated code, the checker holds the tests and requests
values from it, which cross as plain data (see harness.py, checker.py, wire.py). A pass is a random
secret that arrives on a private channel after the last test; the solution's process never holds the
tests, the secret or the channel.

Tiers, strongest first. The probe really tries them and every verdict carries its tier.

    1   namespaces of its own (mounts, processes, network, ipc, hostname), a read-only root that
        shows only Python and its libraries, another uid, no capabilities, resource limits, and a
        filter of system calls and Landlock where the machine has them
    2   Landlock, a filter of system calls, resource limits and, as root, another uid: Python and
        its libraries can be read, nothing can be written, run, signalled or connected to. That a
        file exists, its size, dates and links stay visible
    3   resource limits, an empty environment and a scratch folder; files and network stay open
"""

from __future__ import annotations

import contextlib
import functools
import logging
import marshal
import math
import os
import secrets
import time
from dataclasses import dataclass

from semalign.errors import UserError
from semalign.sandbox.isolation import LANDLOCK_NEEDED, landlock_version, syscall_filter
from semalign.sandbox.launcher import (
    STRONGEST,
    WEAKEST,
    Launcher,
    SandboxError,
    framed,
    in_namespaces,
    receive_line,
    started,
)
from semalign.sandbox.program import Program
from semalign.sandbox.root import PYTHON, visible

_logger = logging.getLogger(__name__)

DEFAULT_TIER = 2

# What the probe runs in a tier to find whether it isolates.
_PROOF_1 = """
import os, socket
assert set(os.listdir("/")) <= {shown}, os.listdir("/")
assert os.listdir("/dev") == ["null"] and os.listdir("/tmp") == []
try:
    assert socket.if_nameindex() in ([], [(1, "lo")]), "the network is in reach"
except PermissionError:
    pass
"""
_PROOF_2 = """
import os, socket
def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return
    raise AssertionError(f"{action.__name__} {arguments} is possible")
refused(socket.socket)
refused(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)
refused(open, "/etc/passwd")
refused(open, "/tmp/semalign-probe", "w")
refused(os.mkdir, "/tmp/semalign-probe")
refused(os.listdir, "/")
refused(os.kill, os.getppid(), 0)
refused(os.kill, PARENT, 0)
refused(os.execv, PYTHON, ["python", "-c", "0"])
refused(os.setsid)
"""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """``passed`` is true only when every test ran to its end; ``seconds`` is wall-clock time."""

    passed: bool
    reason: str
    seconds: float
    tier: int


def run(
    program: Program,
    *,
    timeout_s: float = 3.0,
    memory_mb: int = 512,
    processes: int = 8,
    file_mb: int = 8,
    min_tier: int = DEFAULT_TIER,
) -> Judgement:
    """The verdict on ``program``, whose tests raise when they fail; all it started is killed.

    ``timeout_s`` bounds the wall-clock time of solution and tests, and with it CPU seconds;
    ``memory_mb`` the address space of each process (interpreter included), so that memory is
    bounded by ``memory_mb`` times ``processes``, the number of processes and threads of the
    solution; ``file_mb`` each file. Raises UserError when the machine cannot reach ``min_tier``.
    """
    require_tier(min_tier)
    limits = {
        "RLIMIT_AS": memory_mb * 2**20,
        "RLIMIT_CPU": math.ceil(timeout_s) + 1,
        "RLIMIT_FSIZE": file_mb * 2**20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    return _run(_launcher(), program, timeout_s, limits, processes)


def require_tier(min_tier: int) -> int:
    """The tier of this machine; UserError when it is weaker than ``min_tier``."""
    if not STRONGEST <= min_tier <= WEAKEST:
        raise UserError(f"sandbox.min_tier: expected {STRONGEST} to {WEAKEST}, found {min_tier}")
    tier = probe_tier()
    if tier > min_tier:
        why = "; ".join(f"tier {better}: {_probe(better)}" for better in range(STRONGEST, tier))
        raise UserError(
            f"sandbox.min_tier={min_tier}: this machine reaches only tier {tier} ({why})"
        )
    return tier


def probe_tier() -> int:
    """The strongest tier that works here, found by running programs in it; cached."""
    return _launcher().tier


def _launcher() -> Launcher:
    for tier in range(STRONGEST, WEAKEST):
        if isinstance(found := _probe(tier), Launcher):
            return found
    return _weakest()


@functools.cache
def _weakest() -> Launcher:
    _logger.warning(
        "sandbox: TIER 3 ONLY, generated code runs with resource limits but can reach files and "
        "the network (tier 1: %s; tier 2: %s)",
        *map(_probe, (1, 2)),
    )
    return Launcher(WEAKEST)


@functools.cache
def _probe(tier: int) -> Launcher | str:
    """A launcher into the tier that was found to isolate, or the reason why there is none."""
    needs = "namespaces cannot be made (needs root, or user namespaces, with util-linux)"
    proof = _PROOF_1.format(shown={"dev", "tmp"} | {path.parts[1] for path in visible()})
    candidates = in_namespaces()
    if tier == 2:
        version = landlock_version()
        if version < LANDLOCK_NEEDED:
            found = f"has only version {version}" if version else "has none"
            return f"Landlock {LANDLOCK_NEEDED} is not in this kernel, which {found}"
        if syscall_filter(namespaces=False) is None:
            return "system calls cannot be filtered (needs libseccomp.so.2)"
        needs, candidates = "Landlock or the filter of system calls fails", [Launcher(2)]
        proof = f"PARENT, PYTHON = {os.getpid()}, {str(PYTHON)!r}\n{_PROOF_2}"
    for launcher in candidates:
        try:
            program = Program(solution=proof, tests="")
            verdict = _run(launcher, program, 10.0, {"RLIMIT_CPU": 10}, 8)
        except SandboxError as error:
            _logger.debug("%s", error)
            continue
        if verdict.passed:
            return launcher
        needs = f"the isolation is leaky: {verdict.reason}"
    return needs


def _run(
    launcher: Launcher, program: Program, timeout_s: float, limits: dict[str, int], processes: int
) -> Judgement:
    secret = secrets.token_hex(16)
    tests = marshal.dumps(
        {
            "tests": program.tests,
            "context": program.context,
            "entry": program.entry,
            "secret": secret,
        }
    )
    with started(launcher, program.solution, limits, processes) as channel:
        begin = time.monotonic()
        line = None
        with contextlib.suppress(OSError):  # it may be dead
            channel.settimeout(timeout_s)
            channel.sendall(framed(tests))
        with contextlib.suppress(TimeoutError):
            line = receive_line(channel, begin + timeout_s)
        seconds = time.monotonic() - begin
    return Judgement(
        passed=line == secret.encode(),
        reason=_reason(line, secret, timeout_s),
        seconds=seconds,
        tier=launcher.tier,
    )


def _reason(line: bytes | None, secret: str, timeout_s: float) -> str:
    if line is None:
        return f"timed out after {timeout_s:g} s"
    if line == secret.encode():
        return "passed"
    text = line.decode("utf-8", "replace")
    return text.removeprefix("error ") if text.startswith("error ") else "ended before its tests"
