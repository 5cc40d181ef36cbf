"""The inside of the sandbox: limits itself, runs one untrusted program, reports on its channel.

Executed as ``python -I -S -B -c <this text>``, a marshalled request on its input; never imported.

The secret that means "passed" must stay out of the program's reach although both share a process.
So the last steps, run the program and then write the secret, are one chain of C functions in a
thread of its own: the program has no Python frame beneath it, no name leads to the secret, and the
hook refuses what could find it without a name (the garbage collector's lists, ctypes, hand-made
code objects, interpreters without the hook). An exit code says nothing and is never looked at.
"""

from __future__ import annotations

# Only modules that are built in or loaded at start: the interpreter must be up in milliseconds.
import _thread
import marshal
import os
import resource
import sys
import time
from _collections import deque
from _functools import partial
from _operator import call

REFUSED_EVENTS = frozenset(
    {
        "gc.get_objects",
        "gc.get_referrers",
        "gc.get_referents",
        "sys._current_frames",
        "sys._current_exceptions",
        "code.__new__",
    }
)
REFUSED_IMPORTS = frozenset(
    {"ctypes", "_ctypes", "_testcapi", "_testinternalcapi", "_xxsubinterpreters", "_interpreters"}
)


def refuse(event: str, args: tuple[object, ...]) -> None:
    if event == "import" and args[0] in REFUSED_IMPORTS:
        raise ImportError(f"{args[0]} is not available in the sandbox")
    if event in REFUSED_EVENTS:
        raise RuntimeError(f"{event} is not available in the sandbox")


def limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def prepare() -> int:
    """Starts the program in its thread and returns the channel; nothing of the secret remains."""
    request = marshal.loads(sys.stdin.buffer.read())
    channel: int = request["channel"]
    os.chdir(request["folder"])
    os.environ.clear()
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    if uid := request["uid"]:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    def report(error: object, value: object) -> None:
        name = getattr(error, "__name__", "error")
        try:
            text = f"{name}: {value}"
        except Exception:
            text = name  # the exception is the program's own and may not even have a text
        line = text.encode("utf-8", "backslashreplace").split(b"\n")[0][:200]
        os.write(channel, b"error " + line + b"\n")

    sys.unraisablehook = lambda problem: report(problem.exc_type, problem.exc_value)
    started = _thread.allocate_lock()
    started.acquire()
    chain: list[partial[object]] = [
        partial(started.acquire),
        partial(os.write, channel, b"ready\n"),
        partial(int),  # its place is taken by the program
        partial(os.write, channel, request["secret"].encode() + b"\n"),
    ]
    limits = request["limits"]
    processes = limits.pop("RLIMIT_NPROC")
    limit(limits)
    try:
        code = compile(request["program"], "program", "exec", dont_inherit=True)
        chain[2] = partial(exec, code, {})
    except BaseException as error:
        # Reported from the thread, after "ready", like any other failure of the program.
        chain[2] = partial(report, type(error), str(error))
        del chain[3]
    _thread.start_new_thread(deque, (map(call, chain), 0))
    while not _thread._count():  # a thread is counted by itself, not by its starter
        time.sleep(0.0005)
    limit({"RLIMIT_NPROC": processes})  # after the thread, which counts as a process
    os.dup2(null, 2)  # errors of the harness itself, until here, reach the caller
    os.close(null)
    sys.addaudithook(refuse)
    started.release()
    return channel


def main() -> None:
    channel = prepare()
    while _thread._count():
        time.sleep(0.002)
    os.write(channel, b"end\n")
    os._exit(0)


if __name__ == "__main__":
    main()
