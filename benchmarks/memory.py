"""The plan of every stage against what it takes: peak memory and seconds, as Markdown.

    python benchmarks/memory.py [key=value ...]    # settings of ray_jobs/transfer.py

The shipped models by default; `teacher=F student=F dtype=bfloat16` measures others. A stage is made
in a process of its own, which has everything imported and nothing else done: its peak is the most
resident memory that it had. The plan's figures are those that `--plan` shows for one actor.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import captum.attr  # noqa: F401 -- before the first fork, as all imports
import torch

from semalign import zoo
from semalign.artifacts.artifact import Artifact, Workspace, ordered
from semalign.artifacts.local import LocalExecutor, make_all
from semalign.config.read import resolve
from semalign.methods import Transfer
from semalign.plan import Step, artifact_step
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
    "laten": (["method=laten", "laten.steps=1", "laten.pool=4"], ["translate"]),
}
SMALL = ["data.task=gsm8k", "evaluation.tasks=[gsm8k]", "training.epochs=1"]
ROWS = 8  # of each split: a batch of the attribution


def artifacts(stage: str, settings: list[str]) -> tuple[Workspace, list[Artifact], list[Step]]:
    """The missing artifacts of a stage, and what is planned for them."""
    config = resolve([], settings)
    transfer, workspace = Transfer.of(config), Workspace(config.work)
    known = transfer.known(workspace)
    made = transfer.recipe(workspace).artifacts if known else transfer.first
    wanted = workspace.missing(a for a in ordered(made) if a.stage == stage)
    return workspace, wanted, [artifact_step(config, artifact) for artifact in wanted]


def take(stage: str, settings: list[str], results: Connection) -> None:
    """Make a stage in this process, and send its peak and its seconds."""
    workspace, wanted, _ = artifacts(stage, settings)
    begin = time.monotonic()
    make_all(LocalExecutor(workspace), wanted)
    results.send((peak_bytes("cpu"), time.monotonic() - begin))


def measured(stage: str, settings: list[str]) -> tuple[int, float]:
    """Peak and seconds of a stage."""
    results, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=take, args=(stage, settings, theirs)
    )
    process.start()
    theirs.close()
    try:
        return results.recv()
    finally:
        process.join()


if __name__ == "__main__":
    import json

    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    print("base", peak_bytes("cpu"), flush=True)
    folder = tempfile.mkdtemp(dir="/tmp/plans")
    print(folder, flush=True)
    source = zoo.path("zoo/data") / "gsm8k"
    target = Path(folder, "data", "gsm8k")
    target.mkdir(parents=True)
    for file in source.glob("*.jsonl"):
        (target / file.name).write_text("".join(file.read_text().splitlines(keepends=True)[:ROWS]))
    base = [*SMALL, f"workdir={folder}/work", f"data.root={folder}/data", *arguments]
    for case, (settings, stages) in CASES.items():
        for stage in stages:
            try:
                found = measured(stage, [*base, *settings])
            except EOFError:
                found = None
            print(json.dumps([case, stage, found]), flush=True)
