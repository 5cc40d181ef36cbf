"""Seeking as a method: the teacher's factors, then a LoRA on every layer that starts from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from semalign.artifacts.artifact import Artifact, Cost, Json, Workspace
from semalign.artifacts.host import Host
from semalign.config.jobs import Config
from semalign.config.sections import Seeking
from semalign.core.pairing import Pair
from semalign.data.dataset import Dataset
from semalign.methods.controls import ALIGNMENT, EXTRACTION, without_alignment
from semalign.methods.inputs import Inputs, labelled
from semalign.methods.method import Method, Recipe, register_method
from semalign.methods.seeking.factors import Factors, check_fit, seek
from semalign.models.injection import (
    VOCABULARY,
    count_trainable,
    exports_adapter,
    find_modules,
    inject,
    save_injected,
    save_merged,
)
from semalign.models.memory import WIDE, Batch, cross_entropy, loading, weights
from semalign.models.reference import Model
from semalign.models.shapes import BYTES, skeleton
from semalign.models.vocabulary import Overlap
from semalign.stages.adaptation import ADAPTER, STUDENT, lora_parameters
from semalign.stages.update import Update

_FILE = "factors.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class SensitiveFactors(Artifact):
    """Low-rank factors of the teacher's most sensitive blocks, one for each student matrix."""

    kind = "factors"
    folder = "factors"
    stage = "seek"

    teacher: Model
    student: Model
    rows: Dataset
    shared: Overlap
    seeking: Seeking

    def identity(self) -> Json:
        return {
            "teacher": self.teacher.identity,
            "student": self.student.weights,
            "rows": self.rows.key,
            "shared": self.shared.key,
            **self.seeking.model_dump(mode="json", exclude={"dropout"}),
        }

    @property
    def models(self) -> tuple[Model, ...]:
        return (self.teacher,)

    def cost(self) -> Cost:
        """Sensitivities of the rows, then a window and an SVD for each matrix of the student.

        Memory: the teacher, a float32 sum for every weight of the modules, and the activations of
        one example with a gradient; or, later, the float64 table of one matrix with the first two.
        """
        seeking, teacher = self.seeking, self.teacher.shape
        model, student = skeleton(self.teacher.config), skeleton(self.student.config)
        sums = [weight.numel() for weight in _weights(model, find_modules(model, seeking.modules))]
        ours = find_modules(student, seeking.modules, layers=seeking.layers)
        sizes = [sorted(weight.shape) for weight in _weights(student, ours)]
        factors = count_trainable(
            self.student.config, seeking.modules, seeking.rank, layers=seeking.layers
        )
        blocks = sum(n * m for n, m in sizes) if seeking.subtract == "block" else 0
        size, longest = BYTES[self.teacher.dtype], self.rows.longest
        batch = Batch(self.teacher, 1, longest)
        example = (
            teacher.layers * batch.kept(trained=True)
            + batch.forward
            + cross_entropy(self.teacher, self.rows.most_supervised(1))
            + (size + WIDE) * max(*sums, teacher.head)
        )
        tables = 3 * 8 * max(sums)
        return Cost(
            operations=6.0 * teacher.weights * self.rows.length
            + sum(6.0 * m * n * n + 20.0 * n**3 for n, m in sizes),
            disk=4 * factors + size * blocks,
            memory=max(
                loading(self.teacher),
                weights(self.teacher) + WIDE * sum(sums) + max(example, tables + WIDE * factors),
            ),
        )

    def make(self, folder: Path, host: Host) -> Mapping[str, Json]:
        [model] = host.models(self.teacher)
        factors = seek(
            model,
            self.student.config,
            self.rows,
            self.seeking,
            (self.shared.student_ids, self.shared.teacher_ids),
            trust_remote_code=self.teacher.trust_remote_code,
        )
        factors.save(folder / _FILE)
        return {}

    def notes(self, manifest: Mapping[str, Any]) -> list[str]:
        return [f"{len(self.rows)} examples, {len(self.seeking.modules)} modules a layer"]


def _weights(model: nn.Module, modules: Mapping[Any, str]) -> Iterable[nn.Parameter]:
    for path in modules.values():
        weight = model.get_submodule(path).weight
        assert isinstance(weight, nn.Parameter)
        yield weight


@dataclass(frozen=True, kw_only=True)
class SeekingAdaptation:
    """A LoRA on all layers that starts from the teacher's factors."""

    layers: tuple[int, ...]
    factors: SensitiveFactors

    @property
    def seeking(self) -> Seeking:
        return self.factors.seeking

    @property
    def rank(self) -> int | None:
        return _rank(self.seeking)

    def identity(self) -> Json:
        return {"seeking": self.seeking.subtract, "dropout": self.seeking.dropout}

    def needs(self) -> tuple[Artifact, ...]:
        return (self.factors,)

    def apply(self, model: nn.Module, workspace: Workspace) -> nn.Module:
        factors = Factors.load(workspace.place(self.factors) / _FILE)
        return inject(model, factors, dropout=self.seeking.dropout, subtract=self.seeking.subtract)

    def save(self, model: Any, folder: Path, base: str, *, last: bool) -> None:
        if exports_adapter(model):
            save_injected(model, folder / ADAPTER, base)
        elif last:
            save_merged(model, folder / STUDENT, base)

    def finish(self, folder: Path, base: str) -> None:
        pass

    def parameters(self, student: Model) -> int:
        seeking = self.seeking
        return lora_parameters(student, seeking.modules, seeking.rank, layers=seeking.layers)


def _rank(seeking: Seeking) -> int | None:
    """Of the adapter: the trained product and the one that is taken away."""
    whole = set(VOCABULARY) & set(seeking.modules)
    return None if whole or seeking.subtract == "block" else 2 * seeking.rank


class SeekingMethod(Method):
    """Seeking (Zhong et al., 2024): LoRA that starts from the teacher's most sensitive blocks."""

    def effective(self, config: Config) -> Config:
        return without_alignment(config)

    def unused(self, config: Config) -> Mapping[str, str]:
        names = ("laten", "loss.alpha", "loss.gamma", *ALIGNMENT, *EXTRACTION, "pairing",
                 "attribution", "training.adapter", "training.lora")  # fmt: skip
        return dict.fromkeys(names, f"method={config.method}")

    def rank(self, config: Config) -> int | None:
        return _rank(config.seeking)

    def check(self, config: Config, inputs: Inputs) -> None:
        student, teacher = (skeleton(m.config) for m in (inputs.student, inputs.teacher))
        check_fit(student, teacher, config.seeking, len(inputs.shared.student_ids))

    def recipe(self, config: Config, inputs: Inputs, pairs: tuple[Pair, ...]) -> Recipe:
        factors = SensitiveFactors(
            teacher=inputs.teacher,
            student=inputs.student,
            rows=inputs.attribution_teacher,
            shared=inputs.shared,
            seeking=config.seeking,
        )
        update = Update(
            name=f"{config.data.task}-{config.method}",
            student=inputs.student,
            rows=inputs.train,
            labelled=labelled(config, inputs.train),
            adaptation=SeekingAdaptation(
                layers=tuple(range(inputs.student.layers)), factors=factors
            ),
            loss=config.loss,
            training=config.training,
            extraction=config.extraction,
            seed=config.seed,
        )
        return Recipe(pairs=(), artifacts=(factors, update))


register_method("seeking", SeekingMethod())
