"""The update of a student (section 4.3) as an artifact: its inputs, and its training in a process.

Checkpoints are kept while it is trained, so that a process that was killed goes on where it was.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from semalign.artifacts.activations import Column
from semalign.artifacts.artifact import Artifact, Cost, Json, Workspace
from semalign.artifacts.host import Host
from semalign.config.sections import Extraction, Loss, Training
from semalign.core.losses import OBJECTIVES
from semalign.core.pairing import Pair
from semalign.data.dataset import Dataset
from semalign.data.labels import hide_labels
from semalign.errors import Diverged
from semalign.files import making, sha256
from semalign.models.decoder import Decoder, find_decoder, verify_structure
from semalign.models.fingerprints import model_fingerprint
from semalign.models.heads import read_lm_head
from semalign.models.loading import load_model
from semalign.models.memory import ADAM, WIDE, Batch, cross_entropy, loading, weights
from semalign.models.partial import drop_prefix, drop_suffix
from semalign.models.reference import Model
from semalign.models.shapes import BYTES
from semalign.models.vocabulary import Overlap
from semalign.stages.adaptation import ADAPTER, STUDENT, Adaptation
from semalign.stages.extraction import Activations, Prefix
from semalign.stages.mapping import Map
from semalign.stages.measure import peak_bytes
from semalign.stages.student import CHUNK, SupervisedStudent
from semalign.stages.supervision import (
    Head,
    Supervision,
    Target,
    final_column,
    interfaces,
    reaches_output,
    uses_heads,
)
from semalign.stages.training import Epoch, Save, train

HISTORY = "history.json"  # every step's losses so far, with each checkpoint
MEASURED = "measured.json"  # what was trained, and what it took
_CHECKPOINTS_KEPT = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Update(Artifact):
    """The student with some of its parameters trained on `rows`.

    What no term of the loss needs is None: the teacher and its `targets`, and the `map`. Without
    `prefix` the student is run from its embedding on. The first `labelled` rows have labels (None:
    all). `training` has epochs and learning rate filled in.
    """

    kind = "training"
    folder = "transfers"
    stage = "train"

    name: str  # of the result, for people
    student: Model
    rows: Dataset
    labelled: int | None
    adaptation: Adaptation
    loss: Loss
    training: Training
    extraction: Extraction
    seed: int
    pairs: tuple[Pair, ...] = ()
    prefix: Prefix | None = None
    teacher: Model | None = None
    targets: Activations | None = None
    map: Map | None = None
    shared: Overlap | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return self.name

    def identity(self) -> Json:
        return {
            "student": self.student.identity,
            "rows": self.rows.key,
            "labelled": self.labelled,
            "layers": list(self.adaptation.layers),
            "adaptation": self.adaptation.identity(),
            "seed": self.seed,
            **self._schedule(),
            **self._objective(),
        }

    def _schedule(self) -> Json:
        training = self.training
        return {
            "epochs": training.epochs,
            "lr": training.lr,
            "batch_size": training.batch_size,
            "micro_batch_size": training.micro_batch_size,
            "weight_decay": training.weight_decay,
            "warmup_ratio": training.warmup_ratio,
            "max_grad_norm": training.max_grad_norm,
        }

    def _objective(self) -> Json:
        loss = self.loss
        found: dict[str, Json] = {"alpha": loss.alpha, "beta": loss.beta, "gamma": loss.gamma}
        if loss.alpha > 0:
            found["objective"] = loss.objective
            found["interfaces"] = list(interfaces(self.extraction))
            found["pairs"] = [[list(p.teacher), list(p.weights), p.student] for p in self.pairs]
        if loss.alpha > 0 or loss.gamma > 0:
            found["positions"] = self.extraction.positions
        if uses_heads(loss):
            assert self.teacher is not None and self.shared is not None
            found["heads"] = [self.teacher.weights, self.shared.key]
        return found

    def needs(self) -> tuple[Artifact, ...]:
        own = (self.targets if self._uses_targets else None, self.prefix, self.map)
        return (*(need for need in own if need is not None), *self.adaptation.needs())

    @property
    def _uses_targets(self) -> bool:
        return self.loss.alpha > 0 or self.loss.gamma > 0

    @property
    def trained_parameters(self) -> int:
        return self.adaptation.parameters(self.student)

    def cost(self) -> Cost:
        """All epochs over the student's layers from the first trained one on."""
        shape, rows, loss = self.student.shape, self.rows, self.loss
        first = min(self.adaptation.layers) if self.prefix else 0
        depth, size = shape.layers - first, shape.bytes(self.student.dtype)
        work = 4.0 * depth * shape.per_layer * rows.length + 4.0 * shape.head * rows.supervised
        heads = 0
        if uses_heads(loss):
            assert self.teacher is not None
            heads = self.teacher.shape.head
            # both models' logits of the aligned rows, made twice, and the student's gradient
            terms = (loss.gamma > 0) + (loss.alpha > 0 and OBJECTIVES[loss.objective].uses_heads)
            aligned = int(rows.positions(self.extraction.positions).sum())
            work += terms * aligned * (4.0 * (heads + shape.head) + 2.0 * shape.head)
        assert self.training.epochs is not None
        return Cost(
            operations=self.training.epochs * work,
            disk=0 if self.adaptation.rank is not None else shape.weights * size,
            memory=self._memory(depth, heads),
        )

    def _memory(self, depth: int, heads: int) -> int:
        """Peak bytes of loading the student, of a step with its last `depth` layers, or of writing
        what was trained; `heads` is the size of the teacher's LM head where a term looks at it.
        """
        student, rows, loss = self.student, self.rows, self.loss
        shape, size = student.shape, BYTES[student.dtype]
        examples = min(self.training.micro_batch_size, len(rows))
        batch = Batch(student, examples, rows.longest)
        trained, layers = self.trained_parameters, len(self.adaptation.layers)
        inputs = batch.kept(trained=True) - batch.kept()
        aligned = examples * int(rows.positions(self.extraction.positions).max(initial=0))
        terms = cross_entropy(student, rows.most_supervised(examples)) if loss.beta > 0 else 0
        if loss.alpha > 0:
            terms += aligned * WIDE * self._aligned_widths()
        if heads:  # the rows of both heads over the shared tokens, and a chunk's logits
            terms += (shape.head + heads) * size + 6 * WIDE * CHUNK * shape.vocabulary
        # a whole layer that is trained is kept in float32, and cast where the others are narrower
        cast = size if self.adaptation.rank is None and size < WIDE else 0
        resident = (depth * shape.per_layer + shape.head) * size + (ADAM + cast) * trained
        step = resident + depth * batch.kept() + layers * inputs + batch.forward + terms
        written = WIDE * trained  # a copy for the checkpoint
        merged = 0  # into another copy of the student, in float32
        if self.adaptation.rank is None:
            merged = weights(student) + ADAM * trained + loading(student, dtype="float32")
        return max(loading(student), step, resident + written, merged)

    def _aligned_widths(self) -> int:
        """Numbers of a token that the alignment term makes: its rows, targets and gradients; of the
        map's long way also the coefficients, sorted and chosen.
        """
        theirs = self.teacher or (self.map.teacher if self.map else self.student)
        widths = 4 * self.student.width + 2 * theirs.width
        if self.map is not None and self.map.alignment.top_k is not None:
            widths += 4 * len(self.map.shared.student_ids)
        return widths

    def make(self, folder: Path, host: Host) -> Mapping[str, Json]:
        checkpoint = train_here(self, host)
        return self.publish(checkpoint, folder)

    def publish(self, checkpoint: Path, folder: Path) -> Mapping[str, Json]:
        """Copy the result out of the last checkpoint; returns what the manifest records."""
        for name in (ADAPTER, STUDENT):
            if (checkpoint / name).exists():
                shutil.copytree(checkpoint / name, folder / name)
        shutil.copy(checkpoint / HISTORY, folder / HISTORY)
        self.adaptation.finish(folder, self.student.path)
        return described(folder, json.loads((checkpoint / MEASURED).read_text(encoding="utf-8")))

    def notes(self, manifest: Mapping[str, Any]) -> list[str]:
        workers = manifest.get("workers", 1)
        return [
            f"{manifest['epochs']} epochs" + (f", {workers} worker(s)" if workers > 1 else ""),
            f"{manifest['trained_parameters']:,} parameters",
            f"sha256 {manifest['sha256'][:16]}",
        ]


def described(folder: Path, measured: Mapping[str, Json]) -> dict[str, Json]:
    """What a result's manifest records: whether it is an adapter or a student, its hash, costs."""
    adapter, student = folder / ADAPTER / "adapter_model.safetensors", folder / STUDENT
    return {
        "result": STUDENT if student.exists() else ADAPTER,
        "sha256": sha256(adapter) if adapter.exists() else model_fingerprint(student),
        **measured,
    }


def supervised_student(
    update: Update, workspace: Workspace, device: torch.device
) -> SupervisedStudent:
    """The student from its first trained layer up, on `device`, with its targets at hand.

    The weights of the layers below are dropped, and of those above where no term looks at the
    output. Memory: the layers kept, the LM head, the optimizer state of the trained parameters, and
    the rows of both LM heads if the loss needs the teacher's logits; activations stay on disk.

    **Raises** `UserError`, as `verify_structure` does, for a model that the losses would misread.
    """
    layers = sorted(update.adaptation.layers)
    student = update.student
    model = load_model(
        student.path, dtype=student.dtype, device=None, trust_remote_code=student.trust_remote_code
    )
    verify_structure(find_decoder(model))
    model = update.adaptation.apply(model, workspace)
    decoder = find_decoder(model)
    if update.prefix:
        drop_prefix(decoder, layers[0])
    if not reaches_output(update.loss):
        drop_suffix(decoder, layers[-1])
    model.to(device)
    visible = hide_labels(update.rows, update.labelled)
    source = _Source(update, workspace, visible)
    built = Map.read(workspace.place(update.map)).to(device) if update.map else None
    supervision = Supervision(
        tokens=visible,
        loss=update.loss,
        positions=update.extraction.positions,
        first_layer=layers[0],
        inputs=source.inputs(layers[0]),
        targets=source.targets() if update.loss.alpha > 0 else (),
        transport=built,
        heads=_heads(update, decoder) if uses_heads(update.loss) else None,
        final=source.final() if update.loss.gamma > 0 else None,
    )
    return SupervisedStudent(model, supervision)


@dataclass(frozen=True)
class _Source:
    """The stored activations of an update, cut to what is visible of each row."""

    update: Update
    workspace: Workspace
    visible: Dataset

    def inputs(self, layer: int) -> Any:
        if self.update.prefix is None:
            return None
        rows = self.update.prefix.rows
        visible = hide_labels(rows, self.update.labelled)
        return self._reader(self.update.prefix, Column(layer, "input"), rows, visible)

    def targets(self) -> list[Target]:
        return [
            Target(
                student=pair.student,
                interface=interface,
                readers=tuple(self._target(Column(layer, interface)) for layer in pair.teacher),
                weights=pair.weights,
            )
            for pair in self.update.pairs
            for interface in interfaces(self.update.extraction)
        ]

    def final(self) -> Any:
        assert self.update.teacher is not None
        return self._target(final_column(self.update.teacher.layers))

    def _target(self, column: Column) -> Any:
        """The teacher has as many aligned positions as the student, whatever its ids."""
        assert self.update.targets is not None
        return self._reader(self.update.targets, column, self.update.rows, self.visible)

    def _reader(self, stored: Activations, column: Column, rows: Dataset, kept: Dataset) -> Any:
        return stored.open(self.workspace.place(stored)).reader(column, rows, kept)


def _heads(update: Update, decoder: Decoder) -> tuple[Head, Head]:
    """Both LM heads over the shared vocabulary, on the student's device and in its dtype."""
    teacher, shared = update.teacher, update.shared
    assert teacher is not None and shared is not None
    own = decoder.lm_head.weight.detach()
    other = read_lm_head(teacher.path, trust_remote_code=teacher.trust_remote_code)
    softcap = getattr(teacher.config, "final_logit_softcapping", None)
    return (
        Head(own[shared.student_ids.to(own.device)], decoder.softcap),
        Head(other[shared.teacher_ids].to(own), softcap),
    )


class Progress:
    """What a training has measured so far, and the files that a checkpoint of it holds."""

    def __init__(
        self, update: Update, student: SupervisedStudent, resume: Path | None, *, workers: int = 1
    ) -> None:
        self.update, self.model, self.workers = update, student.model, workers
        self.device = next(student.parameters()).device
        self.history: dict[str, list[float | None]] = {}
        self._begin, self._before = time.monotonic(), 0.0
        if resume is not None:
            self.history = json.loads((resume / HISTORY).read_text(encoding="utf-8"))
            self._before = json.loads((resume / MEASURED).read_text(encoding="utf-8"))["seconds"]

    def add(self, measured: Epoch) -> None:
        for name, values in measured.series.items():
            known = [None if math.isnan(value) else value for value in values]
            self.history.setdefault(name, []).extend(known)

    def write(self, folder: Path, measured: Epoch, save: Save) -> None:
        """The optimizer's and the trained parameters' state, the result so far, the history."""
        save(folder)
        self.keep(folder, last=measured.epoch == self.update.training.epochs)
        (folder / HISTORY).write_text(json.dumps(self.history), encoding="utf-8")
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        took = {
            "pairs": [str(pair) for pair in self.update.pairs],
            "epochs": measured.epoch,
            "workers": self.workers,
            "trained_parameters": trained,
            "seconds": self._before + time.monotonic() - self._begin,
            "peak_bytes": peak_bytes(self.device),
        }
        (folder / MEASURED).write_text(json.dumps(took), encoding="utf-8")

    def keep(self, folder: Path, *, last: bool = True) -> None:
        """Write what is trained so far, as it is served."""
        self.update.adaptation.save(self.model, folder, self.update.student.path, last=last)


def train_here(update: Update, host: Host) -> Path:
    """Train in this process, or go on from the last checkpoint; returns the last one's folder.

    **Raises** `Diverged` on a NaN or infinite loss, naming the last good checkpoint.
    """
    host.forget()  # a training needs the memory
    scratch = host.workspace.scratch(update)
    resume = latest_checkpoint(scratch)
    student = supervised_student(update, host.workspace, host.device)
    progress = Progress(update, student, resume)

    def on_epoch(measured: Epoch, save: Save) -> None:
        progress.add(measured)
        with making(scratch / f"checkpoint_{measured.epoch:06}") as folder:
            progress.write(folder, measured, save)
            print_epoch(measured)
            if host.observe:  # before the checkpoint counts: a kill here loses no epoch's record
                host.observe(measured, progress.keep)
        for old in _checkpoints(scratch)[:-_CHECKPOINTS_KEPT]:
            shutil.rmtree(old)

    try:
        train(student, update.training, update.seed, on_epoch=on_epoch, resume=resume)
    except Diverged as error:
        raise diverged(error, latest_checkpoint(scratch)) from None
    found = latest_checkpoint(scratch)
    assert found is not None
    return found


def latest_checkpoint(scratch: Path) -> Path | None:
    return next(iter(_checkpoints(scratch)[::-1]), None)


def _checkpoints(scratch: Path) -> list[Path]:
    """Those written here, oldest first. Ray Train's lie in the same folder, are named by the time,
    and may be half there.
    """
    return sorted(state.parent for state in scratch.glob(f"checkpoint_{'[0-9]' * 6}/state.pt"))


def diverged(error: Diverged | str, checkpoint: Path | None) -> Diverged:
    return Diverged(f"{error}; last good checkpoint: {checkpoint or 'none yet'}")


def print_epoch(measured: Epoch) -> None:
    """One line an epoch, with the means of its steps."""
    values = "  ".join(f"{k} {v:.4f}" for k, v in measured.summary().items() if k != "epoch")
    # to a named stream: Ray Train turns a plain print into two lines
    print(f"epoch {measured.epoch}: {values}", file=sys.stderr, flush=True)
