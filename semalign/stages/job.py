"""What a training worker needs to know: plain values and paths, no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from semalign.config import Lora
from semalign.core.pairing import Pair
from semalign.stages.store import Identity, content_key
from semalign.stages.train import Hyperparameters


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model folder or hub id, and how to load it."""

    path: str
    dtype: str
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One single-layer update. Stores are (folder, identity); `transport` is a file of align.py."""

    student: ModelSpec
    pairs: tuple[Pair, ...]
    interfaces: tuple[str, ...]
    adapter: str
    lora: Lora
    settings: Hyperparameters
    transport: str
    teacher_store: tuple[str, Identity]
    prefix_store: tuple[str, Identity]

    @property
    def student_layers(self) -> list[int]:
        """Trained layers, from 0, shallowest first."""
        return sorted({pair.student for pair in self.pairs})

    @property
    def key(self) -> str:
        """A name for the result: equal keys, equal adapters (with one worker, to the bit)."""
        return content_key(
            asdict(self.settings),
            self.pairs,
            self.interfaces,
            self.adapter,
            self.lora.model_dump(),
            Path(self.transport).name,
            self.teacher_store[1].key,
            self.prefix_store[1].key,
        )
