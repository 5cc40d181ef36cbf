"""The first process inside the sandbox: forks the processes of one program after another.

Runs under ``python -I -S -B``, where launcher.py has put the modules that it imports in place, and
in tier 1 in the root that root.py makes. It never reads a program: that goes to its processes, on a
channel that is handed on to them. Forking spares each program the start of Python and of the root.
"""

from __future__ import annotations

import gc
import marshal
import os
import socket

from semalign.sandbox.inside.harness import (
    DUMPABLE,
    LIBC,
    SIGKILL,
    attempt,
    prctl,
    start_processes,
    succeed,
)
from semalign.sandbox.inside.wire import receive

TYPE_CHECKING = False  # as type checkers read it; importing typing would double the start
if TYPE_CHECKING:
    from typing import Any

# What generated code imports most: loaded once, for all programs.
_COMMON = """
    bisect collections copy datetime functools heapq itertools math operator random re string sys
    typing
"""
_SUBREAPER, _READ_BOUND, _DROP_BOUND, _AMBIENT, _CLEAR_AMBIENT = 36, 23, 24, 47, 4  # of prctl
_CAPABILITIES = 64  # more than there are
_MOUNTS, _HOSTNAME, _IPC, _PROCESSES, _NETWORK = 0x20000, 0x4000000, 0x8000000, 0x20000000, 1 << 30
_NOSUID, _NODEV = 2, 4  # of mount
_SCRATCH = b"mode=1777,size=16m,nr_inodes=1k"


def fork_programs(settings: dict[str, Any]) -> None:
    """Start a program whenever its channel and leash arrive, and answer when all of it has ended;
    end with the caller.
    """
    inside = settings["namespaces"]
    if inside:
        assert os.getpid() == 1, "all other processes here are the program's"
        _bound_capabilities()
    else:
        prctl(_SUBREAPER, 1)  # it stands in for a namespace of processes
    prctl(DUMPABLE, 0)  # a program of the same user may not trace it either
    # They keep the caller's numbers, which may be high; new ones are low.
    control = socket.socket(fileno=_lowered(settings["control"]))
    if settings["ruleset"] is not None:
        settings["ruleset"] = _lowered(settings["ruleset"])
    for name in _COMMON.split():
        __import__(name)
    gc.freeze()  # a program's first collection copies nothing
    control.sendall(b"ready\n")
    while True:
        _, handed, *_ = socket.recv_fds(control, 1, 2)
        if not handed:
            os._exit(0)
        channel, leash = handed
        checker = os.fork()
        if checker == 0:
            control.close()
            os.close(leash)
            _begin(channel, settings)
        os.close(channel)
        os.read(leash, 1)  # pulled, or the caller is gone
        os.close(leash)
        _end(checker, inside)
        control.sendall(b".\n")


def _begin(channel: int, settings: dict[str, Any]) -> None:
    """Become a program's checker, in namespaces of its own where there are any."""
    try:
        request = marshal.loads(receive(channel))
        if settings["namespaces"]:
            # The solution will be process 1 of one, in which the checker is not.
            spaces = _MOUNTS | _HOSTNAME | _IPC | _PROCESSES | _NETWORK
            succeed(LIBC.unshare(spaces), "unshare")
            scratch = b"scratch", b"/tmp", b"tmpfs", _NOSUID | _NODEV, _SCRATCH
            succeed(LIBC.mount(*scratch), "mount")
        else:
            os.setpgid(0, 0)  # which the filter of system calls forbids to leave
        start_processes(request, channel, settings["ruleset"], settings["filter"])
    except BaseException as error:
        line = f"failed {type(error).__name__}: {error}".encode("utf-8", "backslashreplace")
        attempt(os.write, channel, line.split(b"\n")[0][:500] + b"\n")
    finally:
        os._exit(0)


def _end(checker: int, inside: bool) -> None:
    """Kill and reap all processes of a program."""
    if inside:
        attempt(os.kill, -1, SIGKILL)  # all but this one: process 1 of a namespace
    else:
        attempt(os.killpg, checker, SIGKILL)
    try:
        while True:
            for pid in [] if inside else _children():  # also those that have left the group
                attempt(os.kill, pid, SIGKILL)
            os.wait()
    except ChildProcessError:
        return  # none is left


def _children() -> list[int]:
    try:
        fd = os.open("/proc/thread-self/children", os.O_RDONLY)
    except OSError:
        return []  # a kernel without this file
    with os.fdopen(fd) as file:
        return [int(pid) for pid in file.read().split()]


def _bound_capabilities() -> None:
    """Nothing that is executed below this process has a capability."""
    for number in range(_CAPABILITIES):
        if LIBC.prctl(_READ_BOUND, number, 0, 0, 0) == 1:  # 0: dropped; -1: there is none
            prctl(_DROP_BOUND, number)
    prctl(_AMBIENT, _CLEAR_AMBIENT)


def _lowered(fd: int) -> int:
    """The same file under the lowest number that is free."""
    low = os.dup(fd)
    os.close(fd)
    return low
