"""Does alignment help? SemAlign against cross-entropy alone, chosen on dev, shown on test.

    python benchmarks/effect.py [key=value ...]     # the configuration of ray_jobs/transfer.py

Every variant trains the same layers on the same rows for the same steps, with three seeds. Teacher,
attribution, extraction and map are computed once; the trainings run side by side, one process a
CPU; one vLLM engine scores all adapters. Prints Markdown.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from pathlib import Path

import ray

from semalign.config import Config, resolve
from semalign.engine.cluster import connect
from semalign.engine.evaluation import Candidate
from semalign.engine.scoring import score_candidates
from semalign.engine.steps import Steps
from semalign.report.table import markdown
from semalign.stages.data import Tokens
from semalign.stages.inputs import load_inputs
from semalign.stages.job import TrainJob

SEEDS = (0, 1, 2)
ALPHAS = (0.03, 0.1, 0.3, 1.0)
VARIANTS: dict[str, dict[str, list[str]]] = {
    "cross-entropy only": {"alpha=0": ["loss.alpha=0"]},
    "SemAlign, cosine map": {f"alpha={a:g}": [f"loss.alpha={a}"] for a in ALPHAS},
    "SemAlign, dual map": {
        f"alpha={a:g}": [f"loss.alpha={a}", "alignment.map=dual"] for a in ALPHAS
    },
    "alignment only": {
        "cosine": ["loss.alpha=1", "loss.beta=0"],
        "dual": ["loss.alpha=1", "loss.beta=0", "alignment.map=dual"],
    },
}


@ray.remote(num_cpus=1)
def train_one(job: TrainJob, tokens: list[Tokens], folder: Path) -> Path:
    """The same update as a transfer's with one worker, without its checkpoints."""
    import torch

    from semalign.models.adapters import save_adapter
    from semalign.stages.prepare import build_tail
    from semalign.stages.train import train

    torch.set_num_threads(1)
    if not folder.exists():
        tail = build_tail(job, tokens, torch.device("cpu"))
        train(tail, job.settings, on_epoch=lambda measured, save: None)
        beside = folder.with_name(f".{folder.name}")
        shutil.rmtree(beside, ignore_errors=True)
        save_adapter(tail.model, beside, job.student.path)
        beside.replace(folder)
    return folder


def adapters(base: list[str]) -> dict[tuple[str, str, int], Path]:
    """(family, variant, seed) -> adapter, all trained."""
    running: dict[Path, ray.ObjectRef] = {}
    named = {}
    for family, variants in VARIANTS.items():
        for variant, overrides in variants.items():
            for seed in SEEDS:
                config = resolve([], [*base, *overrides, f"seed={seed}"])
                steps = Steps(config, load_inputs(config))
                pairs = steps.pair(steps.attribute())
                job = steps.job(pairs, steps.extract(pairs), steps.align())
                folder = config.work / "effect" / job.key
                folder.parent.mkdir(parents=True, exist_ok=True)
                if folder not in running:
                    running[folder] = train_one.remote(job, steps.inputs.train, folder)
                named[family, variant, seed] = running[folder]
    return {name: ray.get(done) for name, done in named.items()}


def scores(config: Config, trained: dict[tuple[str, str, int], Path]) -> dict:
    """Accuracy in percent by (name, split), where a name is a model or (family, variant, seed)."""
    candidates = [
        Candidate(name="student", model=config.student),
        Candidate(name="teacher", model=config.teacher),
    ]
    named = {"/".join(map(str, name)): name for name in trained}
    candidates += [
        Candidate(name=text, model=config.student, adapter=str(trained[name]))
        for text, name in named.items()
    ]
    found = score_candidates(config, candidates).scores
    return {(named.get(n, n), split): 100 * s.value for (n, _task, split), s in found.items()}


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def report(config: Config, found: dict) -> str:
    """One row a variant; test only for the variant that dev chose in its family."""
    head = ["", "variant", "dev", "test"]
    body = [
        [name, "", f"{found[name, 'dev']:.1f}", f"{found[name, 'test']:.1f}"]
        for name in ("student", "teacher")
    ]
    for family, variants in VARIANTS.items():
        dev = {v: [found[(family, v, seed), "dev"] for seed in SEEDS] for v in variants}
        best = max(variants, key=lambda v: statistics.mean(dev[v]))
        for variant in variants:
            test = [found[(family, variant, seed), "test"] for seed in SEEDS]
            shown = spread(test) if variant == best else ""
            body.append([family, variant, spread(dev[variant]), shown])
    return markdown(head, body)


def main(overrides: list[str]) -> None:
    begin = time.monotonic()
    task = resolve([], overrides).data.task
    base = [f"evaluation.tasks=[{task}]", *overrides]
    config = resolve([], base)
    with connect(config.cluster.address):
        trained = adapters(base)
        found = scores(config, trained)
    print(f"\n{task}, {config.epochs} epochs, lr {config.lr:g}, seeds {SEEDS}, mean ± sd:\n")
    print(report(config, found))
    print(f"{len(trained)} adapters in {(time.monotonic() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main(sys.argv[1:])
