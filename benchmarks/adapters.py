"""Many adapters on one vLLM engine against an engine for each: the same items, the same answers.

    python benchmarks/adapters.py [key=value ...]     # the configuration of ray_jobs/evaluate.py

Makes eight random LoRAs of the model (their answers are noise, their cost is not), scores them on
one engine, 1, 2, 4 and 8 at a time, then each with an engine of its own. Prints Markdown.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from semalign.config.jobs import EvaluationJob
from semalign.config.read import resolve
from semalign.engine.cluster import connect
from semalign.engine.evaluation import Scored
from semalign.engine.scoring import open_model, score_job
from semalign.models.adapters import lora_on_layers, save_adapter
from semalign.models.loading import load_model
from semalign.report.table import markdown
from semalign.stages.judged import Candidate

COUNTS = (1, 2, 4, 8)
DEFAULTS = ("tasks=[mmlu,gsm8k]", "splits=[dev]")


def make_adapters(job: EvaluationJob, folder: Path, count: int) -> list[Candidate]:
    """LoRAs on layer 1 with random weights, large enough to change the model's answers."""
    made = []
    model = open_model(job, job.model)
    for seed in range(count):
        adapted = lora_on_layers(load_model(job.model), [0], seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.02, generator=generator)
        save_adapter(adapted, folder / f"{seed}", job.model)
        made.append(Candidate(name=f"{seed}", model=model, adapter=str(folder / f"{seed}")))
    return made


def timed(job: EvaluationJob, candidates: list[Candidate], work: Path) -> tuple[float, Scored]:
    begin = time.monotonic()
    scored = score_job(job, candidates, work)
    return time.monotonic() - begin, scored


def main(overrides: list[str]) -> None:
    job = resolve([], [*DEFAULTS, *overrides], EvaluationJob)
    with tempfile.TemporaryDirectory() as scratch, connect(job.cluster.address):
        folder = Path(scratch)
        adapters = make_adapters(job, folder / "adapters", max(COUNTS))
        timed(job, adapters[:1], folder / "warm")  # the files are in the page cache from here on
        shared, apart = {}, []
        for count in COUNTS:
            shared[count], together = timed(job, adapters[:count], folder / f"shared-{count}")
        for candidate in adapters:
            seconds, alone = timed(job, [candidate], folder / f"apart-{candidate.name}")
            apart.append(seconds)
            for key, rows in alone.records.items():
                answers = [record.output for record in rows]
                assert answers == [record.output for record in together.records[key]], key
    items = sum(len(rows) for rows in together.records.values()) // max(COUNTS)
    print(f"{job.model}, {items} items an adapter; answers equal one by one\n")
    rows = [
        [
            str(count),
            f"{shared[count]:.1f}",
            f"{sum(apart[:count]):.1f}",
            f"{sum(apart[:count]) / shared[count]:.2f}",
        ]
        for count in COUNTS
    ]
    print(markdown(["adapters", "one engine, s", "an engine each, s", "ratio"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
