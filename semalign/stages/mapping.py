"""The teacher's stored activations as targets in the student's space (section 4.2)."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from semalign.core.alignment import align, cosine_map, dual_map, recompose, semantic_coefficients
from semalign.core.bases import semantic_bases


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
