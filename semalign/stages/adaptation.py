"""Which parameters of the student are trained, how they start, and how the result is saved."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from semalign.artifacts.artifact import Artifact, Json, Workspace
from semalign.config.sections import Lora
from semalign.models.adapters import full_layers, lora_on_layers, merge_adapter, save_adapter
from semalign.models.injection import count_trainable
from semalign.models.reference import Model

ADAPTER, STUDENT = "adapter", "student"  # folders of a result: a PEFT adapter, a whole model


class Adaptation(Protocol):
    """Makes some of a frozen student's parameters trainable, and saves them.

    `layers` are those that change, from 0. `rank` is that of the LoRA adapter that comes out, None
    where it is a whole student.
    """

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def rank(self) -> int | None: ...

    def identity(self) -> Json: ...

    def needs(self) -> tuple[Artifact, ...]: ...

    def apply(self, model: nn.Module, workspace: Workspace) -> nn.Module:
        """The model, frozen but for what is trained."""

    def save(self, model: nn.Module, folder: Path, base: str, *, last: bool) -> None:
        """Write what is trained into `folder` as `adapter/`, or after the last epoch `student/`."""

    def finish(self, folder: Path, base: str) -> None:
        """Complete the folder of the result, after the last epoch."""

    def parameters(self, student: Model) -> int:
        """How many are trained, from shapes."""


@dataclass(frozen=True)
class LoraAdaptation:
    """LoRA on the linear modules of some layers."""

    layers: tuple[int, ...]
    lora: Lora
    seed: int

    @property
    def rank(self) -> int:
        return self.lora.rank

    def identity(self) -> Json:
        lora = self.lora
        return {
            "lora": sorted(lora.target_modules),
            "rank": lora.rank,
            "alpha": lora.scaling_alpha,
            "dropout": lora.dropout,
        }

    def needs(self) -> tuple[Artifact, ...]:
        return ()

    def apply(self, model: nn.Module, workspace: Workspace) -> nn.Module:
        return lora_on_layers(
            model,
            list(self.layers),
            rank=self.lora.rank,
            alpha=self.lora.scaling_alpha,
            dropout=self.lora.dropout,
            target_modules=self.lora.target_modules,
            seed=self.seed,
        )

    def save(self, model: nn.Module, folder: Path, base: str, *, last: bool) -> None:
        save_adapter(model, folder / ADAPTER, base)

    def finish(self, folder: Path, base: str) -> None:
        pass

    def parameters(self, student: Model) -> int:
        return len(self.layers) * lora_parameters(
            student, self.lora.target_modules, self.lora.rank, layers=1
        )


@functools.lru_cache(maxsize=256)
def lora_parameters(
    student: Model, modules: tuple[str, ...], rank: int, *, layers: int | None
) -> int:
    """How many parameters the factors of some layers have (None: of all)."""
    return count_trainable(student.config, modules, rank, layers=layers)


@dataclass(frozen=True)
class FullAdaptation:
    """All parameters of some layers."""

    layers: tuple[int, ...]

    @property
    def rank(self) -> None:
        return None

    def identity(self) -> Json:
        return "full"

    def needs(self) -> tuple[Artifact, ...]:
        return ()

    def apply(self, model: nn.Module, workspace: Workspace) -> nn.Module:
        full_layers(model, list(self.layers))
        # a step of 3e-4 is lost in bfloat16: trained weights are kept in float32, as PEFT does
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model

    def save(self, model: nn.Module, folder: Path, base: str, *, last: bool) -> None:
        save_adapter(model, folder / ADAPTER, base)

    def finish(self, folder: Path, base: str) -> None:
        merge_adapter(base, folder / ADAPTER, folder / STUDENT)

    def parameters(self, student: Model) -> int:
        return len(self.layers) * student.shape.per_layer


def adaptation(adapter: str, layers: Sequence[int], lora: Lora, seed: int) -> Adaptation:
    """The one that `training.adapter` names."""
    if adapter == "full":
        return FullAdaptation(tuple(layers))
    return LoraAdaptation(tuple(layers), lora, seed)
