"""How long the plan of a large sweep takes: seconds of `--plan` for 10,005 trials.

    python benchmarks/plan.py [key=value ...]    # settings of the sweep's base

Weights, learning rates, ranks and pairing strategies by seeds on the shipped models; prints the
plan, then the seconds of wall time and of CPU as Markdown. Imports are not counted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import yaml

from semalign.engine.planning import show_sweep_plan
from semalign.report.table import markdown
from semalign.sweep.file import load_sweep
from semalign.sweep.trials import count

SWEEP = {
    "description": "weights, learning rates, ranks and strategies",
    "base": {"data": {"task": "mmlu"}, "evaluation": {"tasks": ["mmlu"]}, "loss.alpha": 7.0},
    "axes": {
        "loss.alpha": [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2],
        "training.lr": {"loguniform": [1e-4, 1e-2]},
        "training.lora.rank": [2, 4, 8, 32],
        "pairing.strategy": ["attributed", "proportional", "interpolated", "cka", "reverse"],
    },
    "samples": 10,
    "seeds": [0, 1, 2, 3, 4],
}


def main(overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "large.yaml"
        file.write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
        wall, cpu = time.perf_counter(), time.process_time()
        sweep = load_sweep(file, [f"workdir={folder}/work", *overrides])
        show_sweep_plan(sweep, yes=True)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    trials = count(sweep) + len(sweep.seeds)  # and the base
    print(markdown(["trials", "seconds", "of CPU"], [[f"{trials:,}", f"{wall:.1f}", f"{cpu:.1f}"]]))


if __name__ == "__main__":
    main(sys.argv[1:])
