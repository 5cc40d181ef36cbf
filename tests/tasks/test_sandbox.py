"""Programs that pass, fail, cheat and attack. Every one is really run."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from semalign.errors import UserError
from semalign.tasks import TASKS, read_rows, sandbox
from semalign.tasks.sandbox import probe_tier, require_tier, run

BENCHMARKS = os.environ.get("SEMALIGN_BENCHMARKS")
TIER_1 = pytest.mark.skipif("probe_tier() > 1", reason="namespaces cannot be made on this machine")

PASSES = [
    "assert 1 + 1 == 2",
    "import sys; sys.stdout.write('x' * 10**6); sys.stderr.write('y' * 10**6)",
    "import random, json, re, math, collections, itertools, hashlib, datetime, typing, dataclasses",
    "from __future__ import annotations\nx: Nowhere = 1",
    "open('scratch', 'w').write('x'); assert open('scratch').read() == 'x'",
    "from collections import namedtuple\nassert namedtuple('P', 'x')(1).x == 1",
    "import threading\nt = threading.Thread(target=int)\nt.start(); t.join()\n",
    "assert __name__ != '__main__', 'guarded code of a completion does not run'",
    "s = '\u00e9\u4e16\U0001f600'\nassert len(s) == 3",
]

FAILS = {
    "assert 1 + 1 == 3, 'no'": "AssertionError: no",
    "x = (": "SyntaxError",
    "x = '\x00'": "SyntaxError",
    "undefined": "NameError",
    "raise SystemExit(0)": "ended before its tests",
    "import os; os._exit(0)": "ended before its tests",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "ended before its tests",
    "import sys; sys.exit()": "ended before its tests",
    "class E(Exception):\n def __str__(self): raise E\nraise E": "E",
    "def f(): return f()\nf()": "RecursionError",
    "x = bytearray(10**9)": "MemoryError",
    "x = []\nwhile True: x.append('x' * 10**6)": "MemoryError",
    "open('big', 'wb').write(b'x' * 10**8)": "File too large",
    "files = [open('f' + str(i), 'w') for i in range(1000)]": "Too many open files",
    "import gc; gc.get_objects()": "not available in the sandbox",
    "import gc; gc.get_referrers(gc)": "not available in the sandbox",
    "import sys; sys._current_frames()": "not available in the sandbox",
    "import ctypes": "not available in the sandbox",
    "(lambda: 0).__code__.replace(co_name='x')": "not available in the sandbox",
}

# Each writes lines to everything it may write to, as if it knew what the harness says.
FORGERIES = [
    "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed\\n')\n"
    "    except OSError: pass\nos._exit(0)",
    "import os\nfor fd in range(64):\n    try: os.write(fd, os.read(0, 100))\n"
    "    except OSError: pass\nos._exit(0)",
    # The request, secret included, was on standard input.
    "import os, marshal\nos.lseek(0, 0, 0)\nr = marshal.loads(os.read(0, 10**6))\n"
    "os.write(r['channel'], r['secret'].encode() + b'\\n')\nos._exit(0)",
    # What lies beneath the program on its own stack, and in the main module.
    "import sys, os\nf = sys._getframe()\nwhile f.f_back: f = f.f_back\n"
    "assert 'request' in f.f_locals or 'secret' in str(f.f_globals)",
    "import __main__, os\nsecret = [v for v in vars(__main__).values() if isinstance(v, bytes)][0]",
    "import threading, sys\nassert threading.main_thread().__dict__['secret']",
    "try:\n    raise ValueError\nexcept ValueError as e:\n    f = e.__traceback__.tb_frame.f_back\n"
    "assert f is not None and f.f_locals['chain']",
]

LIMITS = [
    "while True: pass",
    "import time; time.sleep(60)",
    "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "9 ** 9 ** 9 ** 9",
    "import signal, time\nfor s in range(1, 32):\n    try: signal.pthread_sigmask(0, [s])\n"
    "    except Exception: pass\ntime.sleep(60)",
    "while True: print('x' * 10**6)",
]


@pytest.mark.parametrize("program", PASSES)
def test_passes(program: str) -> None:
    verdict = run(program)
    assert verdict.passed, verdict.reason
    assert (verdict.reason, verdict.tier) == ("passed", probe_tier())


@pytest.mark.parametrize("program", FAILS)
def test_fails_with_a_reason(program: str) -> None:
    verdict = run(program)
    assert not verdict.passed
    assert FAILS[program] in verdict.reason


@pytest.mark.parametrize("program", FORGERIES)
def test_a_pass_cannot_be_forged(program: str) -> None:
    assert not run(program).passed


@pytest.mark.parametrize("program", LIMITS)
def test_nothing_outlives_its_limit(program: str) -> None:
    begin = time.monotonic()
    verdict = run(program, timeout_s=0.5)
    assert not verdict.passed
    assert verdict.reason == "timed out after 0.5 s"
    assert 0.4 < verdict.seconds < 1.5 and time.monotonic() - begin < 20


@TIER_1
def test_the_machine_is_out_of_reach(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    attacks = [
        f"open({str(secret)!r})",
        "open('/etc/passwd')",
        "open('/proc/self/mem', 'rb')",
        "import os; os.listdir('/sys')",
        "import os; os.environ['HOME']",
        "open('/lib/x', 'w')",
        "open('/x', 'w')",
        "import subprocess; subprocess.run(['/bin/sh', '-c', ':'], check=True)",
        "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
        "import socket; socket.create_connection(('1.1.1.1', 53), 1)",
        "import socket; socket.socket(socket.AF_UNIX).connect('/run/docker.sock')",
        "import os; os.setuid(0); os.chroot('/tmp')",
        "import os; os.mknod('/tmp/disk', 0o60666, os.makedev(254, 0))",
        "import os; os.kill(1, 0); os.kill(1, 9); raise SystemExit",
        f"import os; os.kill({os.getpid()}, 0)",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import os\nwhile True: os.fork()",
        "import threading as t, time\nwhile True: t.Thread(target=time.sleep, args=(9,)).start()",
    ]
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(run, attacks))
    assert [a for a, v in zip(attacks, verdicts, strict=True) if v.passed] == []


@TIER_1
def test_daemons_die_with_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_random_uid", lambda: 54_321)  # nobody else's
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files, mounts = Path("/proc/self/fd"), Path("/proc/self/mountinfo")
    before = len(list(files.iterdir())), mounts.read_text()
    programs = ["assert True", "assert False"] * 20
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(run, programs))
    assert [verdict.passed for verdict in verdicts] == [True, False] * 20
    assert list(tmp_path.iterdir()) == []
    assert (len(list(files.iterdir())), mounts.read_text()) == before


def test_the_weakest_tier_still_judges_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_launcher", lambda: sandbox._Launcher(sandbox.WEAKEST))
    assert run("assert True").tier == sandbox.WEAKEST
    assert run("assert True").passed
    for program in (*list(FAILS)[:4], *FORGERIES, "import os; os._exit(0)", "x = bytearray(10**9)"):
        assert not run(program).passed
    assert run("while True: pass", timeout_s=0.3).reason == "timed out after 0.3 s"
    with pytest.raises(UserError, match=r"sandbox.min_tier=1: this machine reaches only tier 3"):
        run("assert True", min_tier=1)


def test_min_tier_is_checked() -> None:
    assert require_tier(sandbox.WEAKEST) == probe_tier()
    with pytest.raises(UserError, match="expected 1 to 3, found 0"):
        require_tier(0)


@pytest.mark.skipif(BENCHMARKS is None, reason="SEMALIGN_BENCHMARKS names no folder")
@pytest.mark.parametrize(
    ("task", "file"), [("humaneval", "HumanEval.jsonl.gz"), ("mbpp", "mbpp.jsonl")]
)
def test_published_solutions_pass_and_broken_ones_fail(task: str, file: str) -> None:
    benchmark = TASKS[task]
    rows = read_rows(Path(str(BENCHMARKS)) / task / file, benchmark)[:520]
    solutions = [benchmark.example(row, index).answer for index, row in enumerate(rows)]
    with ThreadPoolExecutor(8) as pool:
        whole = [benchmark.program(s, row) for s, row in zip(solutions, rows, strict=True)]
        verdicts = list(pool.map(lambda program: run(program, timeout_s=60), whole))
        broken = [benchmark.program("    raise SystemExit(0)\n", row) for row in rows]
        fooled = [verdict for verdict in pool.map(run, broken) if verdict.passed]
    failed = [row["task_id"] for row, v in zip(rows, verdicts, strict=True) if not v.passed]
    assert (failed, fooled) == ([], [])
