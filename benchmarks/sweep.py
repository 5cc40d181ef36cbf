"""What a sweep saves, and that it changes nothing: the same transfers together and one by one.

    python benchmarks/sweep.py [trials=8] [key=value ...]    # settings of ray_jobs/transfer.py
    python benchmarks/sweep.py asha                          # how soon a stopped trial makes room

The first runs a sweep of weights by seeds, then `ray_jobs/transfer.py` for each trial in a work
folder of its own, asserts the same scores, and prints both times as Markdown. The
second runs 12 trials of which ASHA stops most, and prints for each that was stopped how long its
CPU was held afterwards. Both start from nothing, in a folder that is removed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient

from semalign.config.dotted import flat, nested
from semalign.report.table import markdown
from semalign.sweep.file import load_sweep
from semalign.sweep.trials import Trial, trials

SEEDS, WEIGHTS = (0, 1), (0.0, 0.03, 0.1, 0.3)
BASE = {"data.task": "mmlu", "training.lr": 3e-3, "evaluation.tasks": ["mmlu"]}
SPLITS = ("dev", "test")


def timed(command: list[str]) -> float:
    """Seconds of a command from the repository's root, whose output is shown when it fails."""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}")
    return time.monotonic() - begin


def scores(work: Path) -> list[dict[str, Any]]:
    """The scores of every run in a work folder that has scored a transferred student."""
    client = MlflowClient(f"sqlite:///{work / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("semalign")
    runs = client.search_runs([experiment.experiment_id])
    wanted = [f"{split}/mmlu/transferred" for split in SPLITS]
    return [
        {"seed": run.data.params["seed"], "alpha": run.data.params["loss.alpha"]}
        | {name: run.data.metrics[name] for name in wanted if name in run.data.metrics}
        for run in runs
        if wanted[0] in run.data.metrics
    ]


def together(folder: Path, base: Mapping[str, Any], number: int) -> tuple[float, list[Trial]]:
    """Seconds of the sweep from a clean folder, and its trials."""
    seeds = SEEDS if number == len(SEEDS) * len(WEIGHTS) else SEEDS[:1]
    weights = list(WEIGHTS[: number // len(seeds)])
    tree = {"base": nested(dict(base) | {"loss.alpha": weights[0]}), "seeds": list(seeds)}
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(tree | {"axes": {"loss.alpha": weights}}))
    overrides = [f"workdir={folder / 'together'}"]
    seconds = timed(["ray_jobs/ablate.py", f"sweep={file}", *overrides])
    return seconds, trials(load_sweep(file, overrides))


def alone(folder: Path, trial: Trial) -> tuple[float, Path]:
    """Seconds of the trial's transfer from a clean folder, and that folder."""
    work, file = folder / trial.id, folder / f"{trial.id}.yaml"
    file.write_text(yaml.safe_dump(trial.config.model_dump(mode="json", exclude={"workdir"})))
    return timed(["ray_jobs/transfer.py", str(file), f"workdir={work}"]), work


def compare(number: int, overrides: list[str]) -> None:
    base = dict(BASE)
    for override in overrides:
        key, _, value = override.partition("=")
        base |= flat({key: yaml.safe_load(value)})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        swept, planned = together(folder, base, number)
        found = {(each["alpha"], each["seed"]): each for each in scores(folder / "together")}
        assert len(found) == len(planned) == number, (len(found), len(planned), number)
        rows, separate = [], 0.0
        for trial in planned:
            seconds, work = alone(folder, trial)
            separate += seconds
            [own] = scores(work)
            same = found[own["alpha"], own["seed"]]
            for name, value in same.items():  # on the report split only what a sweep shows
                assert own[name] == value, f"{trial.label}: {own} alone, {same} in the sweep"
            shown = [f"{100 * own[f'{split}/mmlu/transferred']:.2f}" for split in SPLITS]
            rows.append([f"{trial.label}, seed={trial.seed}", *shown, f"{seconds:.1f}"])
    print(markdown(["trial", "dev", "test", "alone, s"], rows))
    reported = sum(len(each) > 3 for each in found.values())
    print(f"\nThe sweep's scores equal these: {number} on dev, {reported} on test.\n")
    total = [str(number), f"{swept:.1f}", f"{separate:.1f}", f"{separate / swept:.2f}"]
    print(markdown(["trials", "sweep, s", "one by one, s", "ratio"], [total]))


ASHA = """
base:
  data: {task: mmlu, train_limit: 64}
  training: {epochs: 4, batch_size: 16, lr: 1.0e-5}
  evaluation: {tasks: [mmlu]}
  loss.alpha: 0
axes: {training.lr: [1.0e-5, 1.0e-3, 0.03, 0.1, 0.2, 0.3]}
seeds: [0, 1]
scheduler: {asha: {grace_epochs: 1, reduction_factor: 2}}
"""


def asha() -> None:
    """Twelve trials on two CPUs; those that are stopped let go of theirs."""
    import ray

    from semalign.engine.cluster import connect
    from semalign.engine.tuning import ablate

    with tempfile.TemporaryDirectory() as scratch, connect(None, num_cpus=2):
        file, work = Path(scratch) / "asha.yaml", Path(scratch) / "work"
        file.write_text(ASHA)
        begin = time.monotonic()
        held, done = {}, threading.Event()
        watch = threading.Thread(target=until_free, args=(work, held, done))
        watch.start()
        summary = ablate(load_sweep(file, [f"workdir={work}"]))
        done.set()
        watch.join()
        seconds = time.monotonic() - begin
        assert ray.available_resources()["CPU"] == 2
    states = [result.state for result in summary.results]
    assert len(states) == 12 and states.count("finished") + states.count("stopped early") == 12
    assert len(held) == states.count("stopped early"), held
    worst = f"{max(held.values()):.1f}"
    row = [*(str(states.count(s)) for s in ("finished", "stopped early")), f"{seconds:.0f}", worst]
    print(
        markdown(["finished", "stopped early", "all, s", "a CPU held after a stop, s, most"], [row])
    )


def until_free(work: Path, held: dict[str, float], done: threading.Event) -> None:
    """Fill `held`: for each stopped trial the seconds until, of the trials that there were when it
    was stopped, one has let go of its CPU.
    """
    waiting: dict[str, tuple[float, set[str]]] = {}
    last: set[str] = set()
    while not done.wait(0.1):
        groups = training()
        for file in work.glob("sweeps/*/stopped/*.json"):
            begin, before = waiting.setdefault(file.stem, (file.stat().st_mtime, last))
            if file.stem not in held and not before <= groups:
                held[file.stem] = time.time() - begin
        last = groups


def training() -> set[str]:
    """Placement groups that hold CPUs: each is a trial's process, which trains."""
    from ray.util import placement_group_table

    return {
        name
        for name, group in placement_group_table().items()
        if group["state"] == "CREATED" and any("CPU" in b for b in group["bundles"].values())
    }


def main(arguments: list[str]) -> None:
    if arguments == ["asha"]:
        return asha()
    number = 8
    if arguments and arguments[0].startswith("trials="):
        number = int(arguments.pop(0).partition("=")[2])
    if number not in (1, 2, 3, 4, 8):
        sys.exit(f"trials={number}: expected 1 to 4, weights with one seed, or 8, with two")
    compare(number, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
