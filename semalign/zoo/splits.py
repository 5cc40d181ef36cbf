"""Endless rows of the four tasks, cut into splits that cannot share a row.

A row's split is decided by a hash of its content, so splits are disjoint whatever the seeds are,
and the pretraining rows, which are never stored, cannot contain a test row.

    python -m semalign.zoo.splits --out semalign/zoo/data
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

from semalign.tasks.task import Row
from semalign.zoo.programs import function_body, whole_function
from semalign.zoo.questions import question
from semalign.zoo.stories import word_problem

GENERATORS: dict[str, Callable[[Random], tuple[str, Row]]] = {
    "mmlu": question,
    "gsm8k": word_problem,
    "humaneval": function_body,
    "mbpp": whole_function,
}
FAMILY = {"humaneval": "code", "mbpp": "code"}
"""Tasks of one family share their keys: a chain belongs to one split in both."""
BUCKETS = {"extract": 20, "align": 40, "train": 200, "dev": 60, "test": 100, "pretrain": 580}
"""Share of all possible content that each split owns, in thousandths."""
SIZES = {"extract": 32, "align": 128, "train": 1000, "dev": 200, "test": 400}
"""Rows shipped per task."""
SEED = 2026


def split_of(task: str, key: str) -> str:
    """The one split that content `key` of `task` may appear in."""
    digest = hashlib.sha256(f"{FAMILY.get(task, task)}\n{key}".encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % 1000
    for split, share in BUCKETS.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("BUCKETS add up to 1000")


def stream(task: str, split: str, seed: int) -> Iterator[Row]:
    """Rows of `split`, without end; for pretraining, where a row may come again."""
    rng = Random(f"{task}/{split}/{seed}")
    while True:
        key, row = GENERATORS[task](rng)
        if split_of(task, key) == split:
            yield row


def distinct(task: str, split: str, seed: int) -> Iterator[Row]:
    """Rows of `split`, no two of one content."""
    rng, seen = Random(f"{task}/{split}/{seed}"), set()
    while True:
        key, row = GENERATORS[task](rng)
        if split_of(task, key) == split and key not in seen:
            seen.add(key)
            if "task_id" in row:
                row["task_id"] = f"{task}/{split}/{len(seen) - 1}"
            yield row


def shipped(task: str, split: str, seed: int = SEED) -> str:
    """The exact text of the shipped file data/<task>/<split>.jsonl."""
    rows = islice(distinct(task, split, seed), SIZES[split])
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(out: Path) -> None:
    """Write every shipped split below `out`."""
    for task in GENERATORS:
        for split in SIZES:
            path = out / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(shipped(task, split))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the zoo's task data.")
    parser.add_argument("--out", type=Path, required=True)
    write(parser.parse_args().out)
