"""The semantic bases of a model's whole LM head, made once for all that use them (section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from semalign.artifacts.artifact import Artifact, Cost, Json
from semalign.artifacts.host import Host
from semalign.core.bases import semantic_bases
from semalign.models.heads import read_lm_head
from semalign.models.reference import Model

_FILE = "bases.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Bases(Artifact):
    """Output bases (D, V), float32: a unit column for every row of the LM head."""

    kind = "bases"
    folder = "bases"
    stage = "bases"

    model: Model

    def identity(self) -> Json:
        return {"weights": self.model.weights}

    @property
    def label(self) -> str:
        return Path(self.model.path).name

    def cost(self) -> Cost:
        """A Gram matrix, its factorisation, and a solution for every column."""
        width, rows = self.model.shape.width, self.model.shape.vocabulary
        return Cost(
            operations=4.0 * rows * width**2 + width**3 / 3,
            disk=4 * rows * width,
            memory=8 * (3 * rows * width + 3 * width**2),
        )

    def make(self, folder: Path, host: Host) -> Mapping[str, Json]:
        trust = self.model.trust_remote_code
        head = read_lm_head(self.model.path, trust_remote_code=trust).to(host.device)
        bases = semantic_bases(head).cpu().contiguous()
        save_file({"bases": bases}, str(folder / _FILE))
        return {"width": bases.shape[0], "atoms": bases.shape[1]}

    def notes(self, manifest: Mapping[str, Any]) -> list[str]:
        return [f"{self.model.path}: {manifest['atoms']:,} atoms of width {manifest['width']}"]

    @staticmethod
    def read(folder: Path) -> Tensor:
        """(D, V), float32."""
        return load_file(str(folder / _FILE))["bases"]
