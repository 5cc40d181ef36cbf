"""What a forward pass of some training examples reads: gathered in main memory, then sent."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from semalign.data.batches import pad, places
from semalign.data.tokens import count_positions
from semalign.stages.copies import joined, sent
from semalign.stages.supervision import Supervision


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Examples padded to (B, T), and stored rows of them, one after the other.

    Places count through the padded batch. `stored` are the first trained layer's inputs (N, D) at
    the `filled` places, which are no padding. At the `aligned` ones, `lengths` of each example, are
    the rows of each target's readers and the teacher's `final` states; at the `supervised` ones
    `labels` are to be predicted.
    """

    ids: Tensor
    mask: Tensor
    filled: Tensor
    stored: Tensor | None
    aligned: Tensor
    lengths: list[int]
    targets: list[list[Tensor]]
    final: Tensor | None
    supervised: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same on the device."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return sent(value, device)
            return [moved(each) for each in value] if isinstance(value, list) else value

        return MicroBatch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    def hidden(self, dtype: torch.dtype) -> Tensor | None:
        """The first trained layer's input (B, T, D) if it is stored, 0 at padding."""
        if self.stored is None:
            return None
        width = self.stored.shape[1]
        flat = self.stored.new_zeros((self.ids.numel(), width), dtype=dtype)
        return flat.index_copy_(0, self.filled, self.stored.to(dtype)).view(*self.ids.shape, width)


def gathered(data: Supervision, examples: list[int], device: torch.device) -> MicroBatch:
    """The examples' batch in main memory, ready to be sent to `device`."""
    tokens = [data.tokens[e] for e in examples]
    ids, mask = pad(tokens, 0)
    width = ids.shape[1]
    supervised = places(tokens, lambda e: e.supervised_positions, width)
    return MicroBatch(
        ids=ids,
        mask=mask,
        filled=places(tokens, lambda e: slice(len(e.ids)), width),
        stored=None if data.inputs is None else joined([data.inputs[e] for e in examples], device),
        aligned=places(tokens, lambda e: e.align_positions(data.positions), width),
        lengths=[count_positions(e.align_positions(data.positions)) for e in tokens],
        targets=[target.stored(examples, device) for target in data.targets],
        final=None if data.final is None else joined([data.final[e] for e in examples], device),
        supervised=supervised,
        labels=ids.roll(-1, 1).flatten()[supervised],
    )
