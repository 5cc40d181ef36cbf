"""The map from the teacher's space to the student's, from both LM heads (section 4.2, Eq. 1-2)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from semalign.artifacts.artifact import Artifact, Cost, Json
from semalign.artifacts.host import Host
from semalign.config.sections import Alignment
from semalign.core.alignment import align, cosine_map, dual_map, recompose, semantic_coefficients
from semalign.files import writing
from semalign.models.heads import read_lm_head
from semalign.models.memory import WIDE
from semalign.models.reference import Model
from semalign.models.vocabulary import Overlap
from semalign.registry import Registry
from semalign.stages.bases import Bases

_FILE = "map.safetensors"


@dataclass(frozen=True)
class MapKind:
    """A way to bring the teacher's states to the student's space by one matrix (D_S, D_T).

    `matrix(student, teacher)` takes the shared tokens' semantic bases (D, V) or, where it does not
    use bases, the rows (V, D) of the LM heads. With `normalise` the matrix is applied to h / |h|.
    Only a map by bases has the strength's long way (`alignment.top_k`).
    """

    matrix: Callable[[Tensor, Tensor], Tensor]
    description: str
    uses_bases: bool = True
    normalise: bool = True


MAPS: Registry[MapKind] = Registry("map")


def register_map(name: str, kind: MapKind) -> None:
    """Add a map: `alignment.map=<name>` in a configuration then uses it."""
    MAPS.register(name, kind)


register_map("cosine", MapKind(cosine_map, "M = S_S S_T^T: Eq. 1 and 2 as one matrix"))
register_map(
    "dual",
    MapKind(
        dual_map,
        "W_S^+ W_T: the student's least squares to the teacher's logits",
        uses_bases=False,
        normalise=False,
    ),
)


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
        cls, student: Tensor, teacher: Tensor, kind: MapKind, *, top_k: int | None = None
    ) -> Transport:
        """From both models' bases (D, V) or LM head rows (V, D) of the shared tokens."""
        if top_k is None:
            return cls(kind.matrix(student, teacher).float(), normalise=kind.normalise)
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
        """One safetensors file, whole or not there.

        Its metadata hold one entry: the library writes several in an order that changes.
        """
        settings = (
            {"top_k": str(self.top_k)} if self.top_k else {"normalise": str(int(self.normalise))}
        )
        with writing(file) as partial:
            tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
            save_file(tensors, str(partial), settings)

    @classmethod
    def load(cls, file: Path) -> Transport:
        with safe_open(str(file), framework="pt") as handle:
            settings = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return cls(
            tensors.get("matrix"),
            tensors.get("bases_teacher"),
            tensors.get("bases_student"),
            normalise=settings.get("normalise", "1") == "1",
            top_k=int(settings.get("top_k", "0")) or None,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Map(Artifact):
    """The map between two models, over the tokens that both vocabularies have.

    Bases are those of the whole heads, of which the shared tokens' columns are taken: an atom does
    not change because the other model lacks another token.
    """

    kind = "map"
    folder = "maps"
    stage = "align"

    student: Model
    teacher: Model
    shared: Overlap
    alignment: Alignment

    @property
    def how(self) -> MapKind:
        return MAPS.find(self.alignment.map, "alignment.map")

    def identity(self) -> Json:
        heads = (
            {} if self.how.uses_bases else {"heads": [self.student.weights, self.teacher.weights]}
        )
        settings = {"map": self.alignment.map, "top_k": self.alignment.top_k}
        return {**settings, "shared": self.shared.key, **heads}

    def needs(self) -> tuple[Bases, ...]:
        return self._bases if self.how.uses_bases else ()

    @functools.cached_property
    def _bases(self) -> tuple[Bases, ...]:
        return Bases(model=self.student), Bases(model=self.teacher)

    def cost(self) -> Cost:
        """One product over the shared tokens; of the long way a copy of both bases.

        Memory: the shared tokens' part of both bases, while the whole of one is there; for a map
        without bases both heads and a pseudoinverse in float64.
        """
        atoms = len(self.shared.student_ids)
        widths = self.student.width, self.teacher.width
        numbers = widths[0] * widths[1] if self.alignment.top_k is None else atoms * sum(widths)
        if self.how.uses_bases:
            whole = max(model.shape.head for model in (self.student, self.teacher))
            memory = WIDE * (atoms * sum(widths) + whole)
        else:
            memory = 8 * atoms * (2 * widths[0] + widths[1])
        return Cost(
            operations=2.0 * atoms * widths[0] * widths[1],
            disk=4 * numbers,
            memory=memory,
        )

    def make(self, folder: Path, host: Host) -> Mapping[str, Json]:
        sides = (self.student, self.shared.student_ids), (self.teacher, self.shared.teacher_ids)
        if self.how.uses_bases:
            places = map(host.workspace.place, self.needs())
            student, teacher = (
                selected(Bases.read(place).to(host.device), 1, ids)
                for place, (_, ids) in zip(places, sides, strict=True)
            )
        else:
            student, teacher = (selected(_head(m).to(host.device), 0, ids) for m, ids in sides)
        built = Transport.build(student, teacher, self.how, top_k=self.alignment.top_k)
        built.to(torch.device("cpu")).save(folder / _FILE)
        return {}

    def notes(self, manifest: Mapping[str, Any]) -> list[str]:
        return [
            f"{self.alignment.map} map over {len(self.shared.student_ids)} shared tokens",
            f"vocabulary overlap {self.shared.fraction:.2%} of the student's",
        ]

    @staticmethod
    def read(folder: Path) -> Transport:
        return Transport.load(folder / _FILE)


def selected(tensor: Tensor, dim: int, ids: Tensor) -> Tensor:
    """The rows or columns of these ids, on the tensor's device; itself where that is all of it."""
    if torch.equal(ids, torch.arange(tensor.shape[dim])):
        return tensor
    return tensor.index_select(dim, ids.to(tensor.device))


def _head(model: Model) -> Tensor:
    return read_lm_head(model.path, trust_remote_code=model.trust_remote_code)
