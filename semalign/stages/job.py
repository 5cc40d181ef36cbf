"""What a training worker needs to know: plain values and paths, no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from semalign.artifacts.activations import Identity
from semalign.artifacts.files import content_key
from semalign.config.sections import Lora, Seeking
from semalign.core.pairing import Pair


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model folder or hub id, and how to load it."""

    path: str
    dtype: str
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Section 4.3 and Table 5; `batch_size` is global, `micro_batch_size` per worker.

    `objective`, `alpha`, `beta`, `gamma` are those of the configuration's `loss`.
    """

    epochs: int
    lr: float
    batch_size: int
    micro_batch_size: int
    alpha: float
    beta: float
    gamma: float = 0.0
    objective: str = "cosine"
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    positions: str = "all"
    seed: int = 0

    @property
    def reaches_output(self) -> bool:
        """Whether the loss looks at the student's final hidden states."""
        return self.beta > 0 or self.gamma > 0


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One update of the paired layers, or of all `layers`. Stores are (folder, identity);
    `transport` is a file of align.py.

    What no term of the loss needs is None: the teacher's store, the map, and `teacher`, of which
    only the LM head is read. Without a prefix store the student is run from its embedding on. The
    first `labelled` examples have labels; None: all of them. `factors` is Seeking's file, which
    LoRA starts from as `seeking` says.
    """

    student: ModelSpec
    pairs: tuple[Pair, ...]
    interfaces: tuple[str, ...]
    adapter: str
    lora: Lora
    settings: Hyperparameters
    transport: str | None
    teacher_store: tuple[str, Identity] | None
    prefix_store: tuple[str, Identity] | None
    teacher: ModelSpec | None = None
    labelled: int | None = None
    layers: tuple[int, ...] = ()
    factors: str | None = None
    seeking: Seeking | None = None
    prints: tuple[str, ...] = ()  # of the student and the examples, where no store has them

    @property
    def student_layers(self) -> list[int]:
        """Trained layers, from 0, shallowest first."""
        return sorted({pair.student for pair in self.pairs} | set(self.layers))

    @property
    def key(self) -> str:
        """A name for the result: equal keys, equal adapters (with one worker, to the bit)."""
        return content_key(
            asdict(self.settings),
            self.pairs,
            self.interfaces,
            self.adapter,
            self.lora.model_dump(),
            self.transport and Path(self.transport).name,
            self.teacher_store and self.teacher_store[1].key,
            self.prefix_store and self.prefix_store[1].key,
            self.labelled,
            self.layers,
            self.factors and Path(self.factors).name,
            self.seeking and self.seeking.model_dump(),
            self.prints,
        )
