"""What a worker of the cluster holds by the number of examples, in MB of memory of its own.

    python benchmarks/worker_memory.py [examples ...]    # 1000, 10000 and 100000 by default

Examples of 300 random ids. A worker writes one shard of an extraction from the shipped student, as
in a transfer. What processes share, such as Ray's object store, does not count.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import ray

from semalign.artifacts.activations import Column
from semalign.artifacts.artifact import Workspace
from semalign.config.sections import Extraction
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens
from semalign.engine.cluster import connect
from semalign.engine.executor import ModelWorker
from semalign.models.reference import Model
from semalign.report.table import markdown
from semalign.stages.extraction import Activations

COUNTS, LENGTH, PROMPT = (1_000, 10_000, 100_000), 300, 200


class Measured(ModelWorker):
    """The worker of an extraction, which says what it holds."""

    def memory(self) -> float:
        """MB that no other process has."""
        return psutil.Process().memory_full_info().uss / 1e6


def examples(count: int) -> Dataset:
    draw = random.Random(0)
    ids = [tuple(draw.randrange(3, 640) for _ in range(LENGTH)) for _ in range(1000)]
    return Dataset([Tokens(str(n), ids[n % len(ids)], PROMPT) for n in range(count)])


def row(count: int, folder: Path) -> list[str]:
    columns = frozenset([Column(2, "mlp")])
    wanted = Activations(
        model=Model.open("zoo/student", dtype="float32"),
        rows=examples(count),
        columns=columns,
        positions="answer",
        dtype="bfloat16",
        extraction=Extraction(shard_examples=64),
    )
    worker = ray.remote(Measured).options(num_cpus=1).remote(Workspace(folder), 1, None)
    begin = time.monotonic()
    placed = [ray.put(wanted)]
    sent = time.monotonic() - begin
    ray.get(worker.make_shard.remote(wanted.key, placed, folder / "store", 0, sorted(columns)))
    held = ray.get(worker.memory.remote())
    ray.kill(worker)
    return [f"{count:,}", f"{held:.0f}", f"{sent:.2f}"]


def main(counts: Sequence[int]) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder, connect(None, num_cpus=2):
        for count in counts or COUNTS:
            rows.append(row(count, Path(folder) / str(count)))
            print(*rows[-1], file=sys.stderr, flush=True)
    print(markdown(["examples", "MB of a worker", "seconds to send them"], rows))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
