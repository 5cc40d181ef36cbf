"""One program's processes: a process confines itself, forks, and is the checker and the solution.

The tests and the secret are sent to the checker after the fork, on a channel that the solution has
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

LIBC = ctypes.CDLL(None, use_errno=True)
# Options of prctl.
_PDEATHSIG, DUMPABLE, _KEEPCAPS, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 8, 22, 38
SIGKILL = 9
_LANDLOCK_RESTRICT_SELF = 446  # on every architecture
_CAPABILITIES_3, _DAC_READ_SEARCH = 0x20080522, 1 << 2
_FDS = 64


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def confine(request: dict[str, Any], ruleset: int | None, syscalls: bytes | None) -> None:
    """Restrict this process and its children for good, by Landlock's rules and the filter of system
    calls where there are any.
    """
    for name, value in request["limits"].items():
        _limit(name, value)
    os.chdir(request["folder"])
    os.environ.clear()
    if uid := request["uid"]:
        _become(uid, request["search"])
    elif os.getuid() == 0:  # of a user namespace
        _keep_capabilities(0)
    prctl(_NO_NEW_PRIVS, 1)
    prctl(DUMPABLE, 0)  # no process without privileges may trace this one or read its memory
    prctl(_PDEATHSIG, SIGKILL)
    _restrict(ruleset)
    if syscalls:
        program = _FilterProgram(len(syscalls) // 8, syscalls)
        prctl(_SECCOMP, 2, ctypes.addressof(program))


def _become(uid: int, search: bool) -> None:
    """Become another user, with no capability but that to reach a Python in a closed folder."""
    prctl(_KEEPCAPS, int(search))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if search:
        _keep_capabilities(_DAC_READ_SEARCH)


def _keep_capabilities(kept: int) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
    sets = (ctypes.c_uint32 * 6)(kept, kept)
    succeed(LIBC.capset(header, sets), "capset")


def _restrict(ruleset: int | None) -> None:
    if ruleset is not None:
        arguments = map(ctypes.c_long, (_LANDLOCK_RESTRICT_SELF, ruleset, 0))
        succeed(LIBC.syscall(*arguments), "landlock_restrict_self")


def _limit(name: str, value: int) -> None:
    resource.setrlimit(getattr(resource, name), (value, value))


def prctl(option: int, *values: int) -> None:
    padded = (*values, 0, 0, 0, 0)[:4]
    succeed(LIBC.prctl(option, *map(ctypes.c_ulong, padded)), f"prctl {option}")


def succeed(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def start_processes(
    request: dict[str, Any], channel: int, ruleset: int | None, syscalls: bytes | None
) -> None:
    """Become the checker, and start the solution. ``request`` has the solution and the limits,
    nothing of the tests.
    """
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    confine(request, ruleset, syscalls)
    questions, answers = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            os.dup2(null, 2)
            prctl(_PDEATHSIG, SIGKILL)
            _restrict(ruleset)  # once more: what it may touch no longer has the checker
            for fd in {*range(3, _FDS)} - {questions[0], answers[1]}:
                attempt(os.close, fd)
            _limit("RLIMIT_NPROC", request["processes"])
            serve_solution(request["solution"], questions[0], answers[1])
        finally:
            os._exit(0)
    os.close(questions[0])
    os.close(answers[1])
    os.dup2(null, 2)
    os.write(channel, b"ready\n")
    run_tests(marshal.loads(receive(channel)), questions[1], answers[0], channel)
    os._exit(0)


def attempt(action: Callable[..., object], *arguments: object) -> None:
    """Call it; errors of the system do not matter."""
    try:
        action(*arguments)
    except OSError:
        return
