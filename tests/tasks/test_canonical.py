"""The published solutions pass, and what is broken on purpose fails, over whole benchmarks."""

from __future__ import annotations

import ast
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from semalign.sandbox.program import Program
from semalign.sandbox.run import Judgement, run
from semalign.tasks import TASKS, read_rows

BENCHMARKS = os.environ.get("SEMALIGN_BENCHMARKS")
PUBLISHED = pytest.mark.skipif(BENCHMARKS is None, reason="SEMALIGN_BENCHMARKS names no folder")
FILES = {"humaneval": "HumanEval.jsonl.gz", "mbpp": "mbpp.jsonl"}

BROKEN = {
    "none": "return None",
    "exit": "raise SystemExit(0)",
    "os exit": "__import__('os')._exit(0)",
    "loop": "while True: pass",
    "success": """
import os
for fd in range(64):
    try:
        os.write(fd, b"ready\\npassed\\n" + b"0" * 32 + b"\\n")
    except OSError:
        pass
print("passed", "0" * 32, sep="\\n", flush=True)
""",
}


def published(task: str) -> list[tuple[object, Program]]:
    """The id and the program with the published solution of every row."""
    benchmark = TASKS[task]
    rows = read_rows(Path(str(BENCHMARKS)) / task / FILES[task], benchmark)
    answers = [benchmark.example(row, index).answer for index, row in enumerate(rows)]
    return [
        (row["task_id"], benchmark.program(answer, row))
        for row, answer in zip(rows, answers, strict=True)
    ]


def broken(program: Program, body: str) -> Program:
    """The program with that body in every function of its solution."""
    tree = ast.parse(program.solution)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = ast.parse(f"def f():\n{indented(body)}").body[0].body
    return replace(program, solution=ast.unparse(ast.fix_missing_locations(tree)))


def indented(body: str) -> str:
    return "\n".join(f"    {line}" for line in body.strip().splitlines())


def judged(programs: list[Program], timeout_s: float) -> list[Judgement]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda program: run(program, timeout_s=timeout_s), programs))


@PUBLISHED
@pytest.mark.parametrize("task", FILES)
def test_published_solutions_pass(task: str) -> None:
    rows = published(task)[:520]
    verdicts = judged([program for _, program in rows], 60)
    assert [(id, v.reason) for (id, _), v in zip(rows, verdicts, strict=True) if not v.passed] == []


@PUBLISHED
@pytest.mark.parametrize("task", FILES)
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_solutions_fail(task: str, kind: str) -> None:
    rows = published(task)[:: 40 if kind == "loop" else 8]
    verdicts = judged([broken(p, BROKEN[kind]) for _, p in rows], 0.5 if kind == "loop" else 3)
    assert [id for (id, _), v in zip(rows, verdicts, strict=True) if v.passed] == []
