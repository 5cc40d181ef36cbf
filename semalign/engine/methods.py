"""The methods of transfer: SemAlign, the baselines Seeking and LaTen, and the controls.

All but LaTen, which has a training of its own, go through the same Ray Train loop.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from semalign.artifacts.files import content_key
from semalign.core.pairing import Pair
from semalign.data.tokens import fingerprint
from semalign.engine import remote
from semalign.engine.generation import ANYWHERE
from semalign.engine.steps import Steps
from semalign.engine.tracking import Run
from semalign.engine.training import HISTORY, Score
from semalign.methods.laten.transfer import labelled_rows


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a method leaves: its folder and, where layers are paired, the attribution and pairs."""

    folder: Path
    scores: Sequence[float] = ()
    pairs: Sequence[Pair] = ()


def make(steps: Steps, run: Run | None, score: Score | None = None) -> Made:
    """Run the configuration's method, or find it done. ``score``: as `Steps.train` takes it."""
    method = steps.config.method
    if method == "laten":
        return Made(folder=laten(steps, run))
    if not steps.config.pairs_layers:
        factors = seek(steps) if method == "seeking" else None
        return Made(folder=steps.train(steps.whole_job(factors), run, score))
    scores = steps.attribute()
    pairs = steps.pair(scores)
    job = steps.job(pairs, steps.extract(pairs), steps.align())
    return Made(folder=steps.train(job, run, score), scores=scores, pairs=pairs)


def prepare_whole(steps: Steps) -> None:
    """What trials of a method that pairs no layers have in common."""
    if steps.config.method == "seeking":
        seek(steps)


def seek(steps: Steps) -> Path:
    """Seeking's factors, from the attribution split: one file, whatever the seed."""
    config, inputs = steps.config, steps.inputs
    what, tokens = config.seeking.factor_settings, inputs.attribution_teacher
    key = content_key("seeking", steps.prints, fingerprint(tokens), what, config.dtype)
    file = config.work / "factors" / f"{key}.safetensors"
    with steps.stage("seek") as notes:
        if file.exists():
            notes.append("already there")
        else:
            ids = (inputs.overlap.student_ids, inputs.overlap.teacher_ids)
            ray.get(
                remote.seek.options(**steps.gpu_shape).remote(
                    steps.teacher,
                    config.extraction.device_map,
                    inputs.student,
                    tokens,
                    ids,
                    config.seeking,
                    str(file),
                )
            )
        notes.append(f"{len(tokens)} examples, {len(config.seeking.modules)} modules a layer")
    return file


def laten(steps: Steps, run: Run | None) -> Path:
    """LaTen's student, its neurons baked into the weights."""
    config, inputs = steps.config, steps.inputs
    train, align = labelled_rows(config, inputs.train, inputs.align)
    rows = {"train": train, "attribution": inputs.attribution, "align": align}
    prints = [fingerprint(tokens) for tokens in rows.values()]
    what = config.laten.model_dump(), config.data.task, config.seed, config.dtype
    key = content_key("laten", steps.prints, prints, what)
    folder = config.work / "transfers" / key
    with steps.stage("translate") as notes, steps.alone(key):
        if (folder / "manifest.json").exists():
            notes.append("already there")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            task = remote.laten.options(scheduling_strategy=ANYWHERE, **steps.gpu_shape)
            measured, series = ray.get(
                task.remote(
                    (steps.teacher, steps.student),
                    config.extraction.device_map,
                    rows,
                    inputs.overlap.student_to_teacher,
                    config,
                    str(folder),
                )
            )
            (folder / HISTORY).write_text(json.dumps(series), encoding="utf-8")
            if run is not None:
                run.metrics({f"train/{name}": values for name, values in series.items()})
            remote.finish(folder, config, measured)
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        pool = min(config.laten.pool, 1 + len(align))
        notes.append(f"{found['steps']} steps of {pool} examples")
        notes.append(f"{found['trained_parameters']:,} parameters")
        notes.append(f"sha256 {found['sha256'][:16]}")
    return folder
