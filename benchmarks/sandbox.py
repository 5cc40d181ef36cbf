"""What it takes to judge a program: milliseconds in each tier, next to a bare start of Python.

    python benchmarks/sandbox.py [programs]

A program and a start of Python take turns. The bare start isolates nothing and runs no tests.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from semalign.sandbox import run as sandbox
from semalign.sandbox.launcher import WEAKEST, Launcher
from semalign.sandbox.program import Program
from semalign.sandbox.root import PYTHON

PROGRAM = Program(
    solution="from typing import List\n\ndef total(x: List[int]) -> int:\n    return sum(x)\n",
    tests="assert total([1, 2, 3]) == 6\nassert total([]) == 0\n",
    entry=("total",),
)
LIMITS = {"RLIMIT_AS": 2**29, "RLIMIT_CPU": 4, "RLIMIT_FSIZE": 2**23, "RLIMIT_NOFILE": 64}


def main(programs: int = 50) -> None:
    print("| tier | ms a program | ms a start of Python | ratio |\n|---|---:|---:|---:|")
    for tier in (1, 2, WEAKEST):
        launcher = Launcher(tier) if tier == WEAKEST else sandbox._probe(tier)
        if isinstance(launcher, str):
            print(f"| {tier} | {launcher} | | |")
            continue
        judge(launcher)  # starts its server
        pairs = [(seconds(judge, launcher), seconds(bare)) for _ in range(programs)]
        ours, theirs = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"| {tier} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |")


def judge(launcher: Launcher) -> None:
    assert sandbox._run(launcher, PROGRAM, 3.0, LIMITS, 8).passed


def bare() -> None:
    subprocess.run([PYTHON, "-I", "-S", "-B", "-c", "from typing import List"], check=True)


def seconds(call: Callable[..., object], *arguments: object) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
