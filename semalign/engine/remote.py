"""The parts of a transfer that run on a cluster's workers, one function each."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from semalign.artifacts.files import sha256, write_json
from semalign.config.jobs import AnalysisJob, Config
from semalign.config.sections import Seeking
from semalign.engine.training import HISTORY, MEASURED
from semalign.models.fingerprints import model_fingerprint
from semalign.stages.job import ModelSpec, TrainJob

if TYPE_CHECKING:
    from semalign.analysis.figure import FigureInputs


@ray.remote(max_retries=2)
def attribute(
    spec: ModelSpec, device_map: str | None, tokens: list[Any], **how: Any
) -> list[float]:
    import torch

    from semalign.models.decoder import find_decoder, verify_structure
    from semalign.stages import attribution as stage

    torch.set_num_threads(_threads())
    model = _load(spec, device_map)
    verify_structure(find_decoder(model))
    return stage.attribute(model, tokens, **how)


@ray.remote(max_retries=2)
def similarity(
    specs: tuple[ModelSpec, ModelSpec],
    device_map: str | None,
    tokens: tuple[list[Any], list[Any]],
    *,
    batch_size: int,
) -> list[list[float]]:
    """Of teacher and student, side by side: memory for both."""
    import torch

    from semalign.stages.similarity import layer_similarity

    torch.set_num_threads(_threads())
    teacher, student = (_load(spec, device_map) for spec in specs)
    return layer_similarity(teacher, student, *tokens, batch_size=batch_size)


def _load(spec: ModelSpec, device_map: str | None) -> Any:
    from semalign.models.loading import load_model

    return load_model(
        spec.path,
        dtype=spec.dtype,
        device="cuda" if ray.get_gpu_ids() and device_map is None else None,
        device_map=device_map,
        trust_remote_code=spec.trust_remote_code,
    )


@ray.remote(max_retries=2)
def build_transport(
    student: ModelSpec, teacher: ModelSpec, ids: tuple[Any, Any], file: str, **how: Any
) -> None:
    import torch

    from semalign.models.heads import read_lm_head
    from semalign.stages.mapping import Transport

    torch.set_num_threads(_threads())
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    heads = [
        read_lm_head(spec.path, trust_remote_code=spec.trust_remote_code)[rows].to(device)
        for spec, rows in zip((student, teacher), ids, strict=True)
    ]
    Transport.build(heads[0], heads[1], **how).to(torch.device("cpu")).save(Path(file))


@ray.remote(max_retries=2)
def seek(
    teacher: ModelSpec,
    device_map: str | None,
    student: Any,
    tokens: list[Any],
    shared: tuple[Any, Any],
    settings: Seeking,
    file: str,
) -> None:
    """Seeking's factors for the student of that configuration, as a file."""
    import torch

    from semalign.methods.seeking import factors as seeking

    torch.set_num_threads(_threads())
    model = _load(teacher, device_map)
    trust = teacher.trust_remote_code
    factors = seeking.seek(model, student, tokens, settings, shared, trust_remote_code=trust)
    factors.save(file)


@ray.remote(max_retries=2)
def laten(
    specs: tuple[ModelSpec, ModelSpec],
    device_map: str | None,
    rows: dict[str, Any],
    student_to_teacher: Any,
    config: Config,
    folder: str,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """LaTen's student in `folder`; what it took, and the series of its steps. Memory for both
    models.
    """
    import torch

    from semalign.methods.laten import transfer as method
    from semalign.models.loading import load_tokenizer
    from semalign.stages.measure import peak_bytes

    torch.set_num_threads(_threads())
    begin = time.monotonic()
    teacher, student = (_load(spec, device_map) for spec in specs)
    trust = config.trust_remote_code
    tokenizer = load_tokenizer(config.student, trust_remote_code=trust)
    special = set(tokenizer.all_special_ids)
    made = method.transfer(
        teacher,
        student,
        **rows,
        student_to_teacher=student_to_teacher,
        decode=lambda token: "" if token in special else tokenizer.decode([token]),
        task=config.data.task,
        settings=config.laten,
        seed=config.seed,
    )
    device = next(student.parameters()).device
    method.bake(config.student, made.deltas, Path(folder) / "student", trust_remote_code=trust)
    measured = {
        "steps": len(made.steps),
        "located_by": made.located_by,
        "trained_parameters": made.parameters,
        "seconds": time.monotonic() - begin,
        "peak_bytes": peak_bytes(device),
    }
    names = ("loss", "cross_entropy", "penalty", "lr")
    return measured, {name: [getattr(step, name) for step in made.steps] for name in names}


@ray.remote(max_retries=2)
def analyze(job: AnalysisJob, inputs: FigureInputs) -> dict[str, Any]:
    """The data of a figure. Memory for all models that it looks at."""
    import torch

    from semalign.analysis.measure import measure

    torch.set_num_threads(_threads())

    def load(path: str) -> Any:
        trust = job.trust_remote_code
        spec = ModelSpec(path=path, dtype=job.dtype, trust_remote_code=trust)
        return _load(spec, job.device_map)

    return measure(job, inputs, load)


def _threads() -> int:
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def publish(job: TrainJob, checkpoint: Path, folder: Path, config: Config) -> None:
    """The adapter, or the merged student, beside its configuration; the manifest last."""
    from semalign.models.adapters import merge_adapter

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("adapter", "student"):
        if (checkpoint / name).exists():
            shutil.copytree(checkpoint / name, folder / name)
    shutil.copy(checkpoint / HISTORY, folder / HISTORY)
    if job.adapter == "full" and not job.factors:
        merge_adapter(job.student.path, folder / "adapter", folder / "student")
    finish(folder, config, json.loads((checkpoint / MEASURED).read_text(encoding="utf-8")))


def finish(folder: Path, config: Config, measured: dict[str, Any]) -> None:
    """Write the configuration and, last, the manifest of a transfer's folder."""
    adapter, student = folder / "adapter" / "adapter_model.safetensors", folder / "student"
    write_json(folder / "config.json", config.model_dump(mode="json"))
    write_json(
        folder / "manifest.json",
        {
            "method": config.method,
            "result": "student" if student.exists() else "adapter",
            "sha256": sha256(adapter) if adapter.exists() else model_fingerprint(student),
            **measured,
        },
    )
