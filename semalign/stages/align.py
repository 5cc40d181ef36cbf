"""The teacher's stored activations as targets in the student's space (section 4.2)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from semalign.config import Loss
from semalign.core.alignment import align, cosine_map, dual_map, recompose, semantic_coefficients
from semalign.core.bases import semantic_bases
from semalign.core.pairing import Pair
from semalign.models.layers import capped
from semalign.stages.store import Column, Reader


@dataclass(frozen=True)
class Transport:
    """Eq. 1 then Eq. 2, as one matrix (D_S, D_T) or, with `top_k`, the long way through V atoms.

    Cost a token: 2 D_S D_T operations for the matrix; 2 V (D_T + D_S) for the long way.
    """

    matrix: Tensor | None
    bases_teacher: Tensor | None = None
    bases_student: Tensor | None = None
    normalise: bool = True
    top_k: int | None = None

    @classmethod
    def build(
        cls, head_student: Tensor, head_teacher: Tensor, *, map: str, top_k: int | None = None
    ) -> Transport:
        """From the rows of both LM heads over the shared vocabulary: (V, D_S) and (V, D_T)."""
        if map == "dual":
            return cls(dual_map(head_student, head_teacher).float(), normalise=False)
        student, teacher = semantic_bases(head_student), semantic_bases(head_teacher)
        if top_k is None:
            return cls(cosine_map(student, teacher).float())
        return cls(None, teacher.float(), student.float(), top_k=top_k)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D_T) -> (..., D_S), float32, without gradient."""
        hidden = hidden.detach().float()
        if self.matrix is not None:
            return align(hidden, self.matrix, normalise=self.normalise)
        assert self.bases_teacher is not None and self.bases_student is not None
        coefficients = semantic_coefficients(hidden, self.bases_teacher)
        return recompose(coefficients, self.bases_student, top_k=self.top_k)

    def _tensors(self) -> dict[str, Tensor]:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Transport:
        return replace(self, **{name: t.to(device) for name, t in self._tensors().items()})

    def save(self, file: Path) -> None:
        """One safetensors file, written beside and renamed."""
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = {"normalise": str(int(self.normalise)), "top_k": str(self.top_k or 0)}
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        save_file({n: t.contiguous() for n, t in self._tensors().items()}, str(beside), settings)
        beside.replace(file)

    @classmethod
    def load(cls, file: Path) -> Transport:
        with safe_open(str(file), framework="pt") as handle:
            settings = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return cls(
            tensors.get("matrix"),
            tensors.get("bases_teacher"),
            tensors.get("bases_student"),
            normalise=settings["normalise"] == "1",
            top_k=int(settings["top_k"]) or None,
        )


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
    """What one student sublayer is to say: a mix of teacher layers at the same interface.

    student: layer from 0. readers, weights: the teacher layers (two when interpolated) and lambda.
    """

    student: int
    interface: str
    readers: tuple[Reader, ...]
    weights: tuple[float, ...]

    def rows(self, examples: Sequence[int]) -> Tensor:
        """The teacher's rows (positions, D_T) of the examples, one after the other, float32."""
        return torch.cat(
            [
                sum(
                    (
                        w * reader[e].float()
                        for w, reader in zip(self.weights, self.readers, strict=True)
                    ),
                    start=torch.zeros(()),
                )
                for e in examples
            ]
        )


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
