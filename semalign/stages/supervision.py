"""The teacher's stored activations as targets of the student's training (section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from semalign.artifacts.activations import Column, Reader
from semalign.config.sections import Extraction, Loss
from semalign.core.losses import OBJECTIVES
from semalign.core.pairing import Pair
from semalign.data.tokens import Tokens
from semalign.models.decoder import capped
from semalign.stages.copies import joined
from semalign.stages.mapping import Transport


@dataclass(frozen=True)
class Head:
    """The rows of an LM head over the vocabulary two models share: (V, D), and its softcap."""

    weight: Tensor
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), in the head's dtype."""
        return capped(F.linear(hidden.to(self.weight.dtype), self.weight), self.softcap)


@dataclass(frozen=True)
class Target:
    """What one student sublayer is trained to output: a mix of teacher layers at one interface.

    student: layer from 0. readers, weights: the teacher layers (two when interpolated) and lambda.
    """

    student: int
    interface: str
    readers: tuple[Reader, ...]
    weights: tuple[float, ...]

    def stored(self, examples: Sequence[int], device: torch.device) -> list[Tensor]:
        """Each reader's rows (N, D_T) of the examples, one after the other, as they are stored; in
        main memory, ready to be sent to `device`.
        """
        return [joined([reader[e] for e in examples], device) for reader in self.readers]

    def mixed(self, stored: Sequence[Tensor]) -> Tensor:
        """The mix (N, D_T) of each reader's rows, float32, where they are."""
        parts = (w * rows.float() for w, rows in zip(self.weights, stored, strict=True))
        return sum(parts, start=torch.zeros(()))


def final_column(num_layers: int) -> Column:
    """Where the store keeps what the LM head of a model of so many layers reads."""
    return Column(num_layers - 1, "final")


def teacher_columns(
    pairs: Sequence[Pair],
    loss: Loss,
    interfaces: Sequence[str],
    *,
    num_layers: int,
    extra_layers: Sequence[int] = (),
) -> list[Column]:
    """What a transfer needs of its teacher of `num_layers`, without repeats; layers from 0.

    The paired layers if there is an alignment term, `final` if there is a divergence, and
    `extra_layers` in any case.
    """
    layers = {layer for pair in pairs for layer in pair.teacher} if loss.alpha > 0 else set()
    columns = [Column(layer, name) for layer in layers | set(extra_layers) for name in interfaces]
    return sorted([*columns, final_column(num_layers)] if loss.gamma > 0 else columns)


def uses_map(loss: Loss) -> bool:
    """Whether the teacher's rows have to be brought to the student's space."""
    return loss.alpha > 0 and OBJECTIVES.find(loss.objective, "loss.objective").uses_map


def uses_heads(loss: Loss) -> bool:
    """Whether both models' logits over the shared vocabulary are made in a training step."""
    objective = OBJECTIVES.find(loss.objective, "loss.objective")
    return loss.gamma > 0 or (loss.alpha > 0 and objective.uses_heads)


def reaches_output(loss: Loss) -> bool:
    """Whether the loss looks at the student's final hidden states."""
    return loss.beta > 0 or loss.gamma > 0


def interfaces(extraction: Extraction) -> tuple[str, ...]:
    return ("attn", "mlp") if extraction.interface == "both" else (extraction.interface,)


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The training set: tokens, cached inputs of the first trained layer, the teacher's targets.

    Terms of weight zero have nothing here: no `targets`, no `transport` to the student's space, no
    LM heads over the shared vocabulary (student's, teacher's), no `final` states of the teacher.
    Without `inputs` the student is run from its embedding on. `positions` are those that are
    aligned.
    """

    tokens: Sequence[Tokens]
    loss: Loss
    positions: str
    first_layer: int
    inputs: Reader | None = None
    targets: Sequence[Target] = ()
    transport: Transport | None = None
    heads: tuple[Head, Head] | None = None
    final: Reader | None = None
