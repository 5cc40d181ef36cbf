"""Peak memory of what is done with models, from shapes alone: no weight is read.

Figures are bytes of tensors; where a process has its tensors in main memory, `PROCESS` comes on
top. `benchmarks/memory.py` sets the plan of every stage against what it takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from semalign.models.loading import attention_implementation
from semalign.models.reference import Model
from semalign.models.shapes import BYTES

PROCESS = 620_000_000  # resident bytes of a process after all imports, measured
ENGINE = 1_400_000_000  # of an engine's: vLLM's imports, workspaces and compiled kernels
ADAM = 16  # bytes a trained parameter in float32: itself, its gradient, two moments
WIDE = 4  # bytes of a float32, which norms, softmax and losses are computed in


@dataclass(frozen=True)
class Batch:
    """A padded batch of so many sequences of so many tokens in a model."""

    model: Model
    rows: int
    length: int

    @property
    def states(self) -> int:
        """Bytes of one layer's hidden states."""
        return self.rows * self.length * self.model.shape.width * self._size

    @property
    def forward(self) -> int:
        """Bytes of a pass that keeps nothing: some states, and the larger of both sublayers."""
        shape = self.model.shape
        attention = 4 * shape.attention * self._size + self._scores(3)
        mlp = 3 * shape.intermediate * self._size
        widths = shape.width * (2 * self._size + 2 * WIDE)
        return self.rows * self.length * (widths + max(attention, mlp))

    def kept(self, *, trained: bool = False) -> int:
        """Bytes that one layer keeps for a backward pass to its input, and where it is `trained` to
        its weights: then the inputs of its matrices too, in float32.

        Of every norm the input, in float32; queries, keys, values and output of attention; of the
        MLP the gate, its activation and what that is multiplied by.
        """
        shape = self.model.shape
        inner = (4 * shape.attention + 3 * shape.intermediate) * self._size
        inputs = 2 * shape.width + shape.attention + shape.intermediate
        numbers = shape.norms + trained * inputs
        return self.rows * self.length * (WIDE * numbers + inner + self._scores(2))

    @property
    def _size(self) -> int:
        return BYTES[self.model.dtype]

    def _scores(self, copies: int) -> int:
        """Bytes of attention's scores of a token, which only eager attention makes."""
        if attention_implementation(self.model.config) != "eager":
            return 0
        return copies * int(self.model.config.num_attention_heads) * self.length * WIDE


def weights(*models: Model) -> int:
    """Bytes of the models' weights, each model once."""
    return sum({(model.path, model.dtype): model.bytes for model in models}.values())


def loading(model: Model, *, share: float = 1.0, dtype: str | None = None) -> int:
    """Most bytes while a share of a model's weights is loaded in a dtype (default: the model's):
    themselves and, where the checkpoint has another dtype, the pages of its files.
    """
    dtype = dtype or model.dtype
    stored = str(getattr(model.config, "dtype", None) or dtype).removeprefix("torch.")
    pages = 0 if stored == dtype else BYTES.get(stored, WIDE)
    return int(share * model.shape.weights * (BYTES[dtype] + pages))


def cross_entropy(model: Model, rows: int) -> int:
    """Bytes of the logits of so many positions and of their loss, with its backward pass: in
    float32 the log-softmax and two gradients, and a narrower model's own logits.
    """
    size = BYTES[model.dtype]
    return rows * model.shape.vocabulary * (3 * WIDE + (size if size < WIDE else 0))
