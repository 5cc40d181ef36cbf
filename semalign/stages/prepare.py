"""A TrainJob made ready to run on one worker's device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from semalign.artifacts.activations import ActivationStore, Column, Reader
from semalign.data.labels import hide_labels
from semalign.data.tokens import Tokens
from semalign.methods.seeking.factors import Factors
from semalign.models.adapters import full_layers, lora_on_layers, save_adapter
from semalign.models.decoder import Decoder, find_decoder, verify_structure
from semalign.models.heads import read_lm_head
from semalign.models.injection import exports_adapter, inject, save_injected, save_merged
from semalign.models.loading import load_config, load_model, load_tokenizer
from semalign.models.partial import drop_prefix, drop_suffix
from semalign.models.vocabulary import Overlap, vocabulary_overlap
from semalign.stages.job import ModelSpec, TrainJob
from semalign.stages.mapping import Transport
from semalign.stages.student import StudentTail
from semalign.stages.supervision import Head, Supervision, Target, final_column


def build_tail(job: TrainJob, tokens: Sequence[Tokens], device: torch.device) -> StudentTail:
    """The student from its first trained layer up, on `device`, with its targets to hand.

    tokens: the examples the stores were made from, all with their answers. The weights of the
    layers below are dropped, and of those above where no term looks at the output. Memory: the
    layers kept, the LM head, the optimizer state of the trained parameters, and the rows of both
    LM heads if the loss needs the teacher's logits; activations stay on disk.
    """
    layers = job.student_layers
    model = _trainable(job)
    decoder = find_decoder(model)
    if job.prefix_store:
        drop_prefix(decoder, layers[0])
    if not job.settings.reaches_output:
        drop_suffix(decoder, layers[-1])
    model.to(device)
    seen = hide_labels(tokens, job.labelled)
    supervision = Supervision(
        tokens=seen,
        first_layer=layers[0],
        inputs=_prefix(job, tokens, seen),
        targets=_targets(job, tokens, seen) if job.settings.alpha > 0 else (),
        transport=Transport.load(Path(job.transport)).to(device) if job.transport else None,
        heads=_heads(job.student, job.teacher, decoder) if job.teacher else None,
        final=_final(job, tokens, seen) if job.settings.gamma > 0 else None,
    )
    return StudentTail(model, supervision, job.settings)


def _trainable(job: TrainJob) -> nn.Module:
    """The student on the CPU, frozen but for what the job trains. Raises UserError, as
    `verify_structure` does, for one that the losses would misread.
    """
    student, layers = job.student, job.student_layers
    model = load_model(
        student.path, dtype=student.dtype, device=None, trust_remote_code=student.trust_remote_code
    )
    verify_structure(find_decoder(model))
    if job.factors and job.seeking:
        seeking = job.seeking
        factors = Factors.load(Path(job.factors))
        return inject(model, factors, dropout=seeking.dropout, subtract=seeking.subtract)
    if job.adapter == "lora":
        return lora_on_layers(
            model,
            layers,
            rank=job.lora.rank,
            alpha=job.lora.scaling_alpha,
            dropout=job.lora.dropout,
            target_modules=job.lora.target_modules,
            seed=job.settings.seed,
        )
    full_layers(model, layers)
    # a step of 3e-4 is lost in bfloat16: trained weights are kept in float32, as PEFT does
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def save_result(model: nn.Module, job: TrainJob, folder: Path, *, last: bool = True) -> None:
    """Write what was trained into `folder`: as `adapter/` or, after the last epoch, as `student/`
    where no adapter can say it.
    """
    if job.seeking is None:
        save_adapter(model, folder / "adapter", job.student.path)
    elif exports_adapter(model):
        save_injected(model, folder / "adapter", job.student.path)
    elif last:
        save_merged(model, folder / "student", job.student.path)


def _prefix(job: TrainJob, tokens: Sequence[Tokens], seen: Sequence[Tokens]) -> Reader | None:
    if job.prefix_store is None:
        return None
    return _open(job.prefix_store).reader(Column(job.student_layers[0], "input"), tokens, seen)


def _targets(job: TrainJob, tokens: Sequence[Tokens], seen: Sequence[Tokens]) -> list[Target]:
    assert job.teacher_store is not None
    store = _open(job.teacher_store)
    return [
        Target(
            student=pair.student,
            interface=interface,
            readers=tuple(
                store.reader(Column(layer, interface), tokens, seen) for layer in pair.teacher
            ),
            weights=pair.weights,
        )
        for pair in job.pairs
        for interface in job.interfaces
    ]


def _final(job: TrainJob, tokens: Sequence[Tokens], seen: Sequence[Tokens]) -> Reader:
    assert job.teacher_store is not None and job.teacher is not None
    column = final_column(_config(job.teacher).num_hidden_layers)
    return _open(job.teacher_store).reader(column, tokens, seen)


def _heads(student: ModelSpec, teacher: ModelSpec, decoder: Decoder) -> tuple[Head, Head]:
    """Both LM heads over the shared vocabulary, on the student's device and in its dtype."""
    shared = _shared_vocabulary(student, teacher)
    own = decoder.lm_head.weight.detach()
    other = read_lm_head(teacher.path, trust_remote_code=teacher.trust_remote_code)
    softcap = getattr(_config(teacher), "final_logit_softcapping", None)
    return (
        Head(own[shared.student_ids.to(own.device)], decoder.softcap),
        Head(other[shared.teacher_ids].to(own), softcap),
    )


def _shared_vocabulary(student: ModelSpec, teacher: ModelSpec) -> Overlap:
    specs = (student, teacher)
    tokenizers = (load_tokenizer(s.path, trust_remote_code=s.trust_remote_code) for s in specs)
    rows = (_config(spec).vocab_size for spec in specs)
    return vocabulary_overlap(*tokenizers, student_rows=next(rows), teacher_rows=next(rows))


def _config(spec: ModelSpec):  # type: ignore[no-untyped-def]
    return load_config(spec.path, trust_remote_code=spec.trust_remote_code).get_text_config()


def _open(store: tuple[str, object]) -> ActivationStore:
    folder, identity = store
    return ActivationStore(Path(folder), identity)  # type: ignore[arg-type]
