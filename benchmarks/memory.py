"""The plan of every stage against what it takes: peak memory and seconds, as Markdown.

    python benchmarks/memory.py [key=value ...]    # settings of ray_jobs/transfer.py

The shipped models by default; `teacher=F student=F dtype=bfloat16` measures others. A stage is made
in a new process, whose peak is the most resident memory that it had. The plan's figures are those
that `--plan` shows: the memory of one actor, and the time at the speed of a probe of this machine.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from semalign import zoo
from semalign.artifacts.artifact import Workspace, ordered
from semalign.artifacts.local import LocalExecutor, make_all
from semalign.config.read import resolve
from semalign.methods import Transfer
from semalign.models.speed import operations_per_second
from semalign.plan import artifact_step
from semalign.report.table import markdown
from semalign.stages.measure import peak_bytes

PAIRED = "pairing.strategy=cka"  # looks at both attribution and similarity
CASES: dict[str, tuple[list[str], list[str]]] = {  # settings, and the stages that are measured
    "semalign": (
        [PAIRED],
        ["attribute", "similarity", "extract", "prefix", "bases", "align", "train"],
    ),
    "dual map": ([PAIRED, "alignment.map=dual"], ["align"]),
    "strongest atoms": ([PAIRED, "alignment.top_k=64"], ["align", "train"]),
    "whole layer": ([PAIRED, "training.adapter=full"], ["train"]),
    "fisher": ([PAIRED, "loss.objective=fisher"], ["train"]),
    "logit-kd": ([PAIRED, "method=logit-kd"], ["extract", "train"]),
    "sft-all": (["method=sft-all"], ["train"]),
    "sft-all, whole": (["method=sft-all", "training.adapter=full"], ["train"]),
    "seeking": (["method=seeking"], ["seek", "train"]),
    "laten": (["method=laten", "laten.steps=1"], ["translate"]),
}
SMALL = ["data.task=gsm8k", "evaluation.tasks=[gsm8k]"]
ROWS = 8  # of each split: a batch of the attribution


@dataclass(frozen=True)
class Measured:
    """Of a stage: bytes and seconds, planned and taken."""

    planned: int
    peak: int
    estimated: float
    seconds: float


def take(stage: str, settings: list[str]) -> Measured:
    """Make what is missing of a stage in this process."""
    torch.set_num_threads(1)
    config = resolve([], settings)
    transfer, workspace = Transfer.of(config), Workspace(config.work)
    known = transfer.known(workspace)
    made = transfer.recipe(workspace).artifacts if known else transfer.first
    wanted = workspace.missing(a for a in ordered(made) if a.stage == stage)
    steps = [artifact_step(config, artifact) for artifact in wanted]
    begin = time.monotonic()
    make_all(LocalExecutor(workspace), wanted)
    seconds, peak = time.monotonic() - begin, peak_bytes("cpu")
    rate = operations_per_second(config.dtype, transfer.inputs.teacher.width, "cpu")
    return Measured(
        planned=max(step.memory for step in steps),
        peak=peak,
        estimated=sum(step.seconds(rate) for step in steps),
        seconds=seconds,
    )


def measured(stage: str, settings: list[str]) -> Measured:
    """`take` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(take, stage, settings).result()


def few_rows(folder: Path) -> list[str]:
    """Settings of a data folder with the first rows of every split of the shipped GSM8K."""
    target = folder / "data" / "gsm8k"
    target.mkdir(parents=True)
    for file in (zoo.path("zoo/data") / "gsm8k").glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (target / file.name).write_text("".join(lines[:ROWS]), encoding="utf-8")
    return [*SMALL, f"workdir={folder / 'work'}", f"data.root={folder / 'data'}"]


def main(arguments: list[str]) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = [*few_rows(Path(folder)), *arguments]
        for case, (settings, stages) in CASES.items():
            for stage in stages:
                found = measured(stage, [*base, *settings])
                rows.append(
                    [
                        f"{case}: {stage}",
                        f"{found.planned / 1e9:.2f}",
                        f"{found.peak / 1e9:.2f}",
                        f"{found.planned / found.peak:.2f}",
                        f"{found.estimated:.1f}",
                        f"{found.seconds:.1f}",
                    ]
                )
                print(*rows[-1], file=sys.stderr, flush=True)
    print(markdown(["stage", "planned, GB", "peak, GB", "ratio", "estimated, s", "took, s"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
