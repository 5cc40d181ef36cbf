"""Programs that pass, fail and cheat. Every one is really run; attacks are in test_attacks.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from semalign.errors import UserError
from semalign.sandbox import launcher
from semalign.sandbox import run as sandbox
from semalign.sandbox.launcher import WEAKEST, Launcher
from semalign.sandbox.program import Program
from semalign.sandbox.root import found_tool
from semalign.sandbox.run import Judgement, probe_tier, require_tier

TIER_1 = pytest.mark.skipif("probe_tier() > 1", reason="namespaces cannot be made on this machine")

PASSES = [
    "assert 1 + 1 == 2",
    "import sys; sys.stdout.write('x' * 10**6); sys.stderr.write('y' * 10**6)",
    "import random, json, re, math, collections, itertools, hashlib, datetime, typing, dataclasses",
    "from __future__ import annotations\nx: Nowhere = 1",
    "from collections import namedtuple\nassert namedtuple('P', 'x')(1).x == 1",
    "import threading\nt = threading.Thread(target=int)\nt.start(); t.join()\n",
    "assert __name__ != '__main__', 'guarded code of a completion does not run'",
    "s = '\u00e9\u4e16\U0001f600'\nassert len(s) == 3",
    "import ctypes, gc; assert gc.get_objects() and ctypes.sizeof(ctypes.c_int) == 4",
    "import asyncio\nassert asyncio.run(asyncio.sleep(0, 1)) == 1",
    "import os\nif os.fork() == 0: os._exit(0)\nos.wait()",
]
IN_SCRATCH = "open('scratch', 'w').write('x'); assert open('scratch').read() == 'x'"

FAILS = {
    "assert 1 + 1 == 3, 'no'": "AssertionError: no",
    "x = (": "SyntaxError",
    "x = '\x00'": "null bytes",
    "x = '\ud800'": "UnicodeEncodeError",
    "undefined": "NameError",
    "raise SystemExit(0)": "ended before its tests",
    "import os; os._exit(0)": "ended before its tests",
    "import ctypes; ctypes.string_at(0)": "ended before its tests",
    "import sys; sys.exit()": "ended before its tests",
    "raise KeyboardInterrupt": "ended before its tests",
    "class E(Exception):\n def __str__(self): raise E\nraise E": "E",
    "class E(BaseException): pass\nraise E('x')": "E: x",
    "def f(): return f()\nf()": "RecursionError",
    "x = bytearray(10**9)": "MemoryError",
    "x = []\nwhile True: x.append('x' * 10**6)": "MemoryError",
}
FAILS_IN_SCRATCH = {
    "open('big', 'wb').write(b'x' * 10**8)": "File too large",
    "files = [open('f' + str(i), 'w') for i in range(1000)]": "Too many open files",
}

LIMITS = [
    "while True: pass",
    "import time; time.sleep(60)",
    "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "9 ** 9 ** 9 ** 9",
    "import signal, time\nfor s in range(1, 32):\n    try: signal.pthread_sigmask(0, [s])\n"
    "    except Exception: pass\ntime.sleep(60)",
    "while True: print('x' * 10**6)",
]

# What a solution returns, and a test of it. Subclasses are their base, the rest equals itself.
VALUES = {
    "None": "f() is None",
    "True": "f() is True",
    "-7": "f() == -7 and type(f()) is int",
    "3 ** 20_000": "f() == 3 ** 20_000",
    "0.1 + 0.2": "f() == 0.1 + 0.2",
    "[float('nan'), float('-inf'), -0.0]": "repr(f()) == '[nan, -inf, -0.0]'",
    "1 - 2j": "f() == 1 - 2j",
    "'\\ud800 \\0 \u4e16'": "f() == '\\ud800 \\0 \u4e16'",
    "(b'\\xff', bytearray(b'x'))": "f() == (b'\\xff', bytearray(b'x'))",
    "{1: [(), {2}, frozenset({3})], (1, 'x'): {}}": "f() == "
    "{1: [(), {2}, frozenset({3})], (1, 'x'): {}}",
    "__import__('collections').namedtuple('P', 'x y')(1, 2)": "f() == (1, 2)",
    "__import__('collections').Counter('aab')": "f() == {'a': 2, 'b': 1}",
    "__import__('collections').defaultdict(list, a=[1])": "f() == {'a': [1]}",
    "__import__('collections').deque([1, 2], 3)": "list(f()) == [1, 2] and f().maxlen == 3",
    "__import__('enum').IntEnum('E', 'A B').B": "f() == 2",
    "__import__('decimal').Decimal('0.1')": "str(f()) == '0.1' and f() < 1",
    "__import__('fractions').Fraction(1, 3)": "f() * 3 == 1",
    "__import__('datetime').datetime(2020, 2, 29, 1, 2, 3, 4)": "str(f()) == "
    "'2020-02-29 01:02:03.000004'",
    "__import__('datetime').date(2020, 2, 29)": "f().isoformat() == '2020-02-29'",
    "range(1, 9, 2)": "f() == range(1, 9, 2)",
    "int": "f() is int",
    "(i * i for i in range(3))": "list(f()) == [0, 1, 4]",
    "{1: 2}.items()": "list(f()) == [(1, 2)]",
    "map(str, [1])": "'-'.join(f()) == '1'",
    "lambda x: x + 1": "f()(1) == 2",
    "type('C', (), {'x': [1], 'm': lambda self, y=0: y})()": "f().x == [1] and f().m(y=3) == 3",
    "object()": "f() == f() and f() != 1 and len({f(), f(), 1}) == 2",
}

RAISES = {
    "raise ValueError('no')": "ValueError",
    "[][1]": "IndexError",
    "class E(KeyError): pass\n    raise E('x')": "KeyError",
    "b'\\xff'.decode()": "RuntimeError",
}


def run(solution: str, tests: str = "", timeout_s: float = 10.0) -> Judgement:
    program = Program(solution=solution, tests=tests, entry=("f",))
    return sandbox.run(program, timeout_s=timeout_s, min_tier=WEAKEST)


@pytest.fixture(params=[1, 2])
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every tier that isolates, where the machine has it."""
    found = sandbox._probe(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    monkeypatch.setattr(sandbox, "_launcher", lambda: found)
    return int(request.param)


def test_passes(tier: int) -> None:
    programs = PASSES + [IN_SCRATCH] * (tier == 1)
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(run, programs))
    found = [(verdict.reason, verdict.tier) for verdict in verdicts]
    assert found == [("passed", tier)] * len(programs)


def test_fails_with_a_reason(tier: int) -> None:
    programs = FAILS | (FAILS_IN_SCRATCH if tier == 1 else {IN_SCRATCH: "PermissionError"})
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(run, programs))
    assert not any(verdict.passed for verdict in verdicts)
    for expected, verdict in zip(programs.values(), verdicts, strict=True):
        assert expected in verdict.reason


def test_values_cross_as_plain_data() -> None:
    for value, test in VALUES.items():
        verdict = run(f"x = {value}\ndef f(): return x\n", f"assert {test}")
        assert verdict.passed, (value, verdict.reason)


def test_arguments_cross_too() -> None:
    solution = "def f(*args, **kwargs): return args, kwargs\nclass C: pass\nc = C()\n"
    for arguments in (
        "1, [2.5, {'x': (None,)}], y={3}",
        "int, str",
        "range(3)",
        "b'', k='\\ud800'",
    ):
        test = f"assert f({arguments}) == (lambda *a, **k: (a, k))({arguments})"
        assert run(solution, test).passed, arguments
    assert run(solution, "c.x = [1]; assert c.x == [1] and f(c)[0][0] is c").passed
    verdict = run(solution, "f(lambda: 0)")
    assert verdict.reason == "TypeError: a function cannot enter the solution's process"


def test_exceptions_of_the_solution_reach_the_tests() -> None:
    for body, error in RAISES.items():
        solution = f"def f():\n    {body}\n"
        caught = f"try: f()\nexcept {error}: pass\nelse: assert False"
        verdict = run(solution, caught)
        assert verdict.passed, (body, verdict.reason)
        assert run(solution, "f()").reason.startswith(error)
    for body in ("raise SystemExit(0)", "import sys; sys.exit()", "import os; os._exit(0)"):
        verdict = run(f"def f():\n    {body}\n", "try: f()\nexcept BaseException: pass")
        assert (verdict.passed, verdict.reason) == (False, "ended before its tests")


def test_names_of_the_tests() -> None:
    def passes(solution: str, tests: str, context: str = "", entry: tuple[str, ...] = ()) -> bool:
        program = Program(solution=solution, tests=tests, context=context, entry=entry)
        return sandbox.run(program, min_tier=WEAKEST).passed

    fake = "class math:\n    isclose = staticmethod(lambda *a: True)\ndef len(x): return 3\n"
    assert passes(fake, "assert not math.isclose(1, 2)\nassert len([]) == 0")
    assert passes(fake, "assert len([]) == 3", entry=("len",))
    context = "import math\ndef helper(x): return math.floor(f(x))\ndef f(x):\n    '''To do.'''\n"
    solution = "def f(x): return 2.5\ndef helper(x): return 7\ny = [1]\n"
    assert passes(solution, "assert helper(1) == 2 and y == [1]", context, ("f",))
    assert passes(
        solution, "def check(g): assert [g(i) for i in y] == [2.5]\ncheck(f)", context, ("f",)
    )
    assert not passes("", "sum", entry=("sum",))
    assert not passes(solution, "nowhere")


@pytest.mark.parametrize("program", LIMITS)
def test_nothing_outlives_its_limit(program: str) -> None:
    begin = time.monotonic()
    verdict = run(program, timeout_s=0.5)
    assert not verdict.passed
    assert verdict.reason == "timed out after 0.5 s"
    assert 0.4 < verdict.seconds < 1.5 and time.monotonic() - begin < 20


@TIER_1
def test_daemons_die_with_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_random_uid", lambda: 54_321)  # nobody else's
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        time.sleep(600)\n    os._exit(0)\nos.wait()\n"
    )
    assert run(daemon).passed
    deadline = time.monotonic() + 5
    while processes_of(54_321) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(54_321) == []


def processes_of(uid: int) -> list[str]:
    return subprocess.run(["ps", "-U", str(uid)], capture_output=True, text=True).stdout.split()[4:]


def test_runs_at_once_do_not_disturb_one_another_and_leave_nothing(
    tier: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files, mounts = Path("/proc/self/fd"), Path("/proc/self/mountinfo")
    launcher.close_idle()
    before = len(list(files.iterdir())), mounts.read_text()
    programs = ["assert True", "assert False"] * 100
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(run, programs))
    assert [verdict.passed for verdict in verdicts] == [True, False] * 100
    assert list(tmp_path.iterdir()) == []
    launcher.close_idle()
    assert (len(list(files.iterdir())), mounts.read_text()) == before


def test_a_solution_inherits_nothing_but_its_two_pipes(tier: int, tmp_path: Path) -> None:
    """Not even of a caller with so many open files that their numbers exceed the limits inside."""
    program = (
        "import os\ndef is_open(fd):\n    try: os.fstat(fd)\n    except OSError: return False\n"
        "    return True\nfds = [fd for fd in range(4096) if is_open(fd)]\n"
        "assert fds[:3] == [0, 1, 2] and len(fds) == 5, fds\n"
    )
    with contextlib.ExitStack() as held:
        for number in range(200):
            held.enter_context((tmp_path / str(number)).open("w"))
        assert run(program).reason == "passed"


def test_one_server_serves_one_program_after_another(tier: int) -> None:
    """It is replaced when it dies, and a fork of the caller has others."""
    launcher.close_idle()
    assert all(run("assert True").passed for _ in range(5))
    [server] = launcher._idle[sandbox._launcher()]
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    assert run("assert True").passed
    [replaced] = launcher._idle[sandbox._launcher()]
    assert replaced is not server
    child = os.fork()
    if child == 0:
        os._exit(0 if not launcher._idle and run("assert True").passed else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert run("assert True").passed and launcher._idle[sandbox._launcher()] == [replaced]


@TIER_1
def test_a_program_has_no_capability_and_cannot_get_one() -> None:
    """Neither now, nor by what it would execute."""
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None)\nsets = (ctypes.c_uint * 6)(*[1] * 6)\n"
        "assert libc.capget((ctypes.c_uint * 2)(0x20080522, 0), sets) == 0\n"
        "assert list(sets) == [0] * 6, list(sets)\n"
        "bound = [n for n in range(64) if libc.prctl(23, n, 0, 0, 0) == 1]\n"
        "assert not bound, bound\n"
        "assert libc.prctl(39, 0, 0, 0, 0) == 1, 'new privileges'\n"
    )
    assert run(program).reason == "passed"


def test_a_program_leaves_nothing_to_the_next(tier: int) -> None:
    """They come from one process, which never has what they change."""
    leave = "import sys, typing\ntyping.left = sys.left = 1\n"
    if tier == 1:
        leave += "open('/tmp/left', 'w').write('x')\n"
    look = (
        "import os, sys, typing\nassert not hasattr(typing, 'left') and not hasattr(sys, 'left')\n"
    )
    look += "assert not os.path.exists('/tmp/left')\n"
    for program in (leave, look):
        assert run(program).reason == "passed"


def test_nothing_outlives_a_caller_that_is_killed(tier: int) -> None:
    solution = "import os, time\nos.fork()\ntime.sleep(987)"
    caller = (
        "from semalign.sandbox import run as sandbox\n"
        "from semalign.sandbox.program import Program\n"
        f"found = sandbox._probe({tier})\nsandbox._launcher = lambda: found\nprint(flush=True)\n"
        f"sandbox.run(Program(solution={solution!r}, tests=''), timeout_s=60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    deadline = time.monotonic() + 20
    # The server, the checker, the solution and its child are there.
    while len(started := descendants(process.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(started) >= 4 and alive(started) == []


def descendants(root: int) -> list[int]:
    lines = subprocess.check_output(["ps", "-e", "-o", "pid=,ppid="], text=True).splitlines()
    parents = {int(pid): int(parent) for pid, parent in map(str.split, lines)}
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_the_weakest_tier_still_judges_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_launcher", lambda: Launcher(WEAKEST))
    assert run("assert True").tier == WEAKEST
    for program in (*PASSES, IN_SCRATCH):
        assert run(program).passed
    for program in (*FAILS, *FAILS_IN_SCRATCH):
        assert not run(program).passed
    assert run("while True: pass", timeout_s=0.3).reason == "timed out after 0.3 s"
    with pytest.raises(UserError, match=r"sandbox.min_tier=1: this machine reaches only tier 3"):
        sandbox.run(Program(solution="", tests=""), min_tier=1)


def test_tools_are_found_where_only_roots_path_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's users have no /usr/sbin in their PATH, where chroot is."""
    wanted = {name: found_tool(name) for name in ("chroot", "mount", "sh")}
    if not all(wanted.values()):
        pytest.skip("util-linux and coreutils are not installed")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert {name: found_tool(name) is not None for name in wanted} == dict.fromkeys(wanted, True)
    assert found_tool("no-such-program") is None


def test_min_tier_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_tier(WEAKEST) == probe_tier()
    with pytest.raises(UserError, match="expected 1 to 3, found 0"):
        require_tier(0)
    sandbox._probe.cache_clear()
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)
    monkeypatch.setattr(launcher, "found_tool", lambda name: None)
    try:
        with pytest.raises(
            UserError, match=r"namespaces cannot be made .* tier 2: Landlock 3 is not"
        ):
            require_tier(2)
    finally:
        sandbox._probe.cache_clear()
