"""The inside of the sandbox: confines itself, forks, and becomes the checker and the solution.

Runs under ``python -I -S -B``, where launcher.py has put the modules that it imports in place. The
tests and the secret are sent to the checker after the fork, on a channel that the solution has
closed: they never are in the solution's memory, nor in a file that it holds.
"""

from __future__ import annotations

# Few modules: the interpreter must be up in milliseconds.
import ctypes
import marshal
import os
import resource

from semalign.sandbox.inside.checker import run_tests
from semalign.sandbox.inside.solution import serve_solution
from semalign.sandbox.inside.wire import receive

TYPE_CHECKING = False  # as type checkers read it; importing typing would double the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
# Options of prctl.
_PDEATHSIG, _DUMPABLE, _KEEPCAPS, _SECCOMP, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 8, 22, 36, 38
_SIGKILL = 9
_LANDLOCK_RESTRICT_SELF = 446  # on every architecture
_CAPABILITIES_3, _DAC_READ_SEARCH = 0x20080522, 1 << 2
_FDS = 64


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def confine(request: dict[str, Any]) -> None:
    """Restrict this process and its children for good."""
    for name, value in request["limits"].items():
        _limit(name, value)
    os.chdir(request["folder"])
    os.environ.clear()
    if uid := request["uid"]:
        _become(uid, request["search"])
    _prctl(_NO_NEW_PRIVS, 1)
    _prctl(_DUMPABLE, 0)  # no process without privileges may trace this one or read its memory
    _prctl(_PDEATHSIG, _SIGKILL)
    _restrict(request["ruleset"])
    if code := request["filter"]:
        program = _FilterProgram(len(code) // 8, code)
        _prctl(_SECCOMP, 2, ctypes.addressof(program))


def _become(uid: int, search: bool) -> None:
    """Become another user, with no capability but that to reach a Python in a closed folder."""
    _prctl(_KEEPCAPS, int(search))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if search:
        header = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
        sets = (ctypes.c_uint32 * 6)(_DAC_READ_SEARCH, _DAC_READ_SEARCH)
        _succeed(_LIBC.capset(header, sets), "capset")


def _restrict(ruleset: int | None) -> None:
    if ruleset is not None:
        arguments = map(ctypes.c_long, (_LANDLOCK_RESTRICT_SELF, ruleset, 0))
        _succeed(_LIBC.syscall(*arguments), "landlock_restrict_self")


def _limit(name: str, value: int) -> None:
    resource.setrlimit(getattr(resource, name), (value, value))


def _prctl(option: int, *values: int) -> None:
    padded = (*values, 0, 0, 0, 0)[:4]
    _succeed(_LIBC.prctl(option, *map(ctypes.c_ulong, padded)), f"prctl {option}")


def _succeed(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def start_processes(request: dict[str, Any]) -> None:
    """Start both processes; ``request`` has the solution and the limits, nothing of the tests."""
    channel, leash = request["channel"], request["leash"]
    if leash is not None:
        _supervise(leash, channel)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    confine(request)
    questions, answers = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            os.dup2(null, 2)
            _prctl(_PDEATHSIG, _SIGKILL)
            _restrict(request["ruleset"])  # once more: what it may touch no longer has the checker
            # Those of the caller keep their numbers, which may be high.
            for fd in {*request["fds"], *range(3, _FDS)} - {questions[0], answers[1]}:
                _try(os.close, fd)
            _limit("RLIMIT_NPROC", request["processes"])
            serve_solution(request["solution"], questions[0], answers[1])
        finally:
            os._exit(0)
    os.close(questions[0])
    os.close(answers[1])
    os.dup2(null, 2)  # errors of the harness itself, until here, reach the caller
    os.write(channel, b"ready\n")
    run_tests(marshal.loads(receive(channel)), questions[1], answers[0], channel)
    os._exit(0)


def _supervise(leash: int, channel: int) -> None:
    """Continue in a child; the parent kills and reaps what is left once the leash closes.

    It stands in for a namespace of processes. The caller's death closes the leash, too.
    """
    _prctl(_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # which the filter of system calls forbids to leave
        os.close(leash)
        return
    os.close(channel)
    os.read(leash, 1)
    _try(os.killpg, child, _SIGKILL)
    try:
        while True:
            for pid in _children():  # also those that have left the group
                _try(os.kill, pid, _SIGKILL)
            os.wait()
    finally:
        os._exit(0)  # no child is left


def _children() -> list[int]:
    try:
        fd = os.open("/proc/thread-self/children", os.O_RDONLY)
    except OSError:
        return []  # a kernel without this file
    with os.fdopen(fd) as file:
        return [int(pid) for pid in file.read().split()]


def _try(action: Callable[..., object], *arguments: object) -> None:
    try:
        action(*arguments)
    except OSError:
        return
