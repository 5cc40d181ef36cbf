"""Programs that attack, under every tier: what they want does not happen, and none passes.

A forgery is wrong and wants to pass; the tests accept it when any single check of theirs does. An
escape reports success by what ``attack`` returns, and what it is after is looked at from outside.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from semalign.sandbox import launcher
from semalign.sandbox import run as sandbox
from semalign.sandbox.launcher import WEAKEST, Launcher
from semalign.sandbox.program import Program
from semalign.sandbox.run import Judgement
from tests.sandbox.attacks.escapes import BOMBS, ESCAPES
from tests.sandbox.attacks.forgeries import CHECKS, FORGERIES

MARGIN_S = 1.0


@pytest.fixture(params=[1, 2, 3])
def any_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    found = sandbox._probe(request.param) if request.param < WEAKEST else Launcher(WEAKEST)
    if isinstance(found, str):
        pytest.skip(found)
    monkeypatch.setattr(sandbox, "_launcher", lambda: found)
    return int(request.param)


@pytest.fixture
def tier(any_tier: int) -> int:
    if any_tier == WEAKEST:
        pytest.skip("tier 3 isolates nothing")
    return any_tier


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder that any user may write to, with a file that any user may read and write."""
    folder = Path(tempfile.mkdtemp(prefix="semalign-outside-"))
    folder.chmod(0o777)
    (folder / "canary").write_text("alive")
    (folder / "canary").chmod(0o666)
    yield folder
    shutil.rmtree(folder)


def judged(programs: list[Program], timeout_s: float = 3.0) -> list[Judgement]:
    def one(program: Program) -> Judgement:
        return sandbox.run(program, timeout_s=timeout_s, min_tier=WEAKEST)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, programs))


def test_the_checks_accept_the_right_solution(any_tier: int) -> None:
    """Each check is passed by some honest value, so that a forgery has something to win."""
    for check, value in CHECKS.items():
        program = Program(solution=f"def f(x): return {value}", tests=f"assert {check}")
        assert judged([program])[0].passed, check


def test_no_pass_is_forged(any_tier: int) -> None:
    accepted = "\n".join(
        f"try:\n    if {check}: found.append({check!r})\nexcept Exception: pass" for check in CHECKS
    )
    tests = f"found = []\n{accepted}\nassert found\n"
    names = list(FORGERIES)
    programs = [Program(solution=FORGERIES[n], tests=tests, entry=("f",)) for n in names]
    verdicts = judged(programs, 2.0)
    assert [name for name, v in zip(names, verdicts, strict=True) if v.passed] == []
    assert max(verdict.seconds for verdict in verdicts) < 2.0 + MARGIN_S


def test_nothing_escapes(tier: int, outside: Path) -> None:
    with Victim() as victim, Listeners(outside) as listeners:
        names = {
            "OUTSIDE": str(outside),
            "PROJECT": str(Path(__file__).resolve().parents[2]),
            "HOME": str(Path.home()),
            "VICTIM": victim.pid,
            "PARENT": os.getpid(),
            "TCP": listeners.port("tcp"),
            "UDP": listeners.port("udp"),
        }
        given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        programs = [
            Program(solution=given + text, tests="assert attack()", entry=("attack",))
            for text in ESCAPES.values()
        ]
        priority = os.getpriority(os.PRIO_PROCESS, 0)
        verdicts = judged(programs)
        assert [n for n, v in zip(ESCAPES, verdicts, strict=True) if v.passed] == []
        assert max(verdict.seconds for verdict in verdicts) < 3.0 + MARGIN_S
        assert listeners.received() == []
        assert victim.alive()
        assert {path.name for path in outside.iterdir()} == {"canary", "unix", "log"}
        assert (outside / "canary").read_text() == "alive"
        assert (outside / "canary").stat().st_mode & 0o777 == 0o666
        assert list(Path("/tmp").glob("*escaped*")) == []
        assert os.getpriority(os.PRIO_PROCESS, 0) == priority


def test_bombs_stay_within_their_limits(tier: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_random_uid", lambda: 54_322)  # nobody else's
    before = running()
    for name, text in BOMBS.items():
        begin = time.monotonic()
        program = Program(solution=text, tests="assert attack()", entry=("attack",))
        verdict = judged([program], 0.5)[0]
        assert not verdict.passed, (name, verdict.reason)
        assert time.monotonic() - begin < 0.5 + 2 * MARGIN_S, name  # the start included
    assert sandbox.run(Program(solution="", tests=""), min_tier=WEAKEST).passed
    deadline = time.monotonic() + 5
    while running() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running() <= before


def running() -> int:
    """How many processes the user has who is attacked from."""
    user = "54322" if os.geteuid() == 0 else str(os.getuid())
    found = subprocess.run(["ps", "-U", user, "-o", "pid="], capture_output=True, text=True)
    return len(found.stdout.split())


class Victim:
    """A process outside that nobody inside may stop or see."""

    def __enter__(self) -> Victim:
        self.process = subprocess.Popen(["sleep", "600"])
        self.pid = self.process.pid
        return self

    def alive(self) -> bool:
        state = Path(f"/proc/{self.pid}/stat").read_text().split()[2]
        return self.process.poll() is None and state == "S"

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


class Listeners:
    """Open ports of three kinds on this machine, and what came in."""

    def __init__(self, folder: Path) -> None:
        self.sockets = {
            "tcp": socket.socket(socket.AF_INET, socket.SOCK_STREAM),
            "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "unix": socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
            "log": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
            "abstract": socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
        }
        local, here = ("127.0.0.1", 0), (str(folder / "unix"), str(folder / "log"))
        addresses = (local, local, *here, "\0semalign-outside")
        for item, address in zip(self.sockets.values(), addresses, strict=True):
            item.bind(address)
            item.setblocking(False)
            if item.type == socket.SOCK_STREAM:
                item.listen()
        (folder / "unix").chmod(0o777)
        (folder / "log").chmod(0o777)

    def port(self, name: str) -> int:
        return int(self.sockets[name].getsockname()[1])

    def received(self) -> list[str]:
        found = []
        for name, item in self.sockets.items():
            try:
                item.recv(1) if item.type == socket.SOCK_DGRAM else item.accept()
                found.append(name)
            except BlockingIOError:
                continue
        return found

    def __enter__(self) -> Listeners:
        return self

    def __exit__(self, *error: object) -> None:
        for item in self.sockets.values():
            item.close()
