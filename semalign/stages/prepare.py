"""A TrainJob made ready to run on one worker's device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from semalign.models.adapters import full_layers, lora_on_layers
from semalign.models.layers import drop_prefix, find_decoder
from semalign.models.loading import load_model
from semalign.stages.align import Target, Transport
from semalign.stages.data import Tokens
from semalign.stages.job import TrainJob
from semalign.stages.store import ActivationStore, Column
from semalign.stages.train import StudentTail, Supervision


def build_tail(job: TrainJob, tokens: Sequence[Tokens], device: torch.device) -> StudentTail:
    """The student from its first trained layer up, on `device`, with its targets to hand.

    The weights of the layers below are dropped. Memory: the layers k.., the LM head, and the
    optimizer state of the trained parameters; activations stay on disk.
    """
    first = job.student_layers[0]
    student = job.student
    model = load_model(
        student.path, dtype=student.dtype, device=None, trust_remote_code=student.trust_remote_code
    )
    if job.adapter == "lora":
        model = lora_on_layers(
            model,
            job.student_layers,
            rank=job.lora.rank,
            alpha=job.lora.scaling_alpha,
            dropout=job.lora.dropout,
            target_modules=job.lora.target_modules,
            seed=job.settings.seed,
        )
    else:
        full_layers(model, job.student_layers)
        # a step of 3e-4 is lost in bfloat16: trained weights are kept in float32, as PEFT does
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    drop_prefix(find_decoder(model), first)
    model.to(device)
    supervision = Supervision(
        tokens=tokens,
        first_layer=first,
        inputs=_open(job.prefix_store).reader(Column(first, "input"), tokens),
        targets=_targets(job, tokens),
        transport=Transport.load(Path(job.transport)).to(device),
    )
    return StudentTail(model, supervision, positions=job.settings.positions)


def _targets(job: TrainJob, tokens: Sequence[Tokens]) -> list[Target]:
    store = _open(job.teacher_store)
    return [
        Target(
            student=pair.student,
            interface=interface,
            readers=tuple(store.reader(Column(layer, interface), tokens) for layer in pair.teacher),
            weights=pair.weights,
        )
        for pair in job.pairs
        for interface in job.interfaces
    ]


def _open(store: tuple[str, object]) -> ActivationStore:
    folder, identity = store
    return ActivationStore(Path(folder), identity)  # type: ignore[arg-type]
