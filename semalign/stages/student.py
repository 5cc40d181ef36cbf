"""The student from its first trained layer up, and the sums that its losses average.

The layers below never change, so their output is read from a store and they are not run; logits are
made at the positions that a term looks at, and no term of weight zero is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from semalign.core.losses import OBJECTIVES, chunked_sum, cross_entropy_sum, kl_divergence_sum
from semalign.data.tokens import Tokens, count_positions
from semalign.models.decoder import capture, find_decoder, logits, run_base
from semalign.models.partial import run_from
from semalign.stages.copies import Ahead
from semalign.stages.microbatch import MicroBatch, gathered
from semalign.stages.supervision import Supervision

CHUNK = 256  # rows whose logits are held at a time


class SupervisedStudent(nn.Module):
    """Layers k.. of the student: inputs of layer k -> the sums that Eq. 3 and Eq. 4 average."""

    def __init__(self, model: nn.Module, supervision: Supervision) -> None:
        super().__init__()
        self.model = model
        self.supervision = supervision
        self._objective = OBJECTIVES.find(supervision.loss.objective, "loss.objective")
        self._decoder = find_decoder(model)
        self._ahead = Ahead[MicroBatch]()

    def counts(self, batch: Sequence[int]) -> dict[str, int]:
        """What each term of the loss is averaged over, in a whole batch of examples."""
        loss, tokens = self.supervision.loss, [self.supervision.tokens[e] for e in batch]
        lengths = [count_positions(self._aligned(example)) for example in tokens]
        sequences = sum(length >= 2 for length in lengths)
        counts = {
            "alignment": sequences if self._objective.per_sequence else sum(lengths),
            "cross_entropy": sum(
                count_positions(example.supervised_positions) for example in tokens
            ),
            "divergence": sum(lengths),
        }
        weights = (loss.alpha, loss.beta, loss.gamma)
        return {name: n for (name, n), w in zip(counts.items(), weights, strict=True) if w > 0}

    def useful(self, batch: Sequence[int]) -> list[int]:
        """The examples of a batch that some term looks at: L_CE alone looks at no prompt alone."""
        loss = self.supervision.loss
        if loss.alpha > 0 or loss.gamma > 0:
            return list(batch)
        return [e for e in batch if self.supervision.tokens[e].labelled]

    def prepare(self, examples: list[int]) -> None:
        """Begin to read what a pass of the examples will need, while a GPU works."""
        if self._device.type == "cuda":
            self._ahead.begin(self._gather, examples)

    def micro_batch(self, examples: list[int]) -> MicroBatch:
        """What a pass of the examples reads, on the model's device."""
        return self._ahead.take(self._gather, examples).to(self._device)

    def forward(self, examples: list[int]) -> dict[str, Tensor]:
        """The sum of each term over `examples`; the alignment's is the mean over its targets."""
        data, decoder, dtype = self.supervision, self._decoder, self._dtype
        batch = self.micro_batch(examples)
        hidden = batch.hidden(dtype)
        wanted = [(target.student, target.interface) for target in data.targets]
        # trained weights are float32; products run in the dtype of the others
        mixed = torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)
        with mixed, capture(decoder, wanted) as seen:
            if hidden is None:
                final = run_base(decoder, batch.ids, batch.mask)
            else:
                final = run_from(decoder, data.first_layer, hidden, batch.mask)
        sums, loss = {}, data.loss
        if loss.alpha > 0:
            parts = [
                self._alignment(_rows(seen[key], batch.aligned), target.mixed(rows), batch.lengths)
                for target, key, rows in zip(data.targets, wanted, batch.targets, strict=True)
            ]
            sums["alignment"] = torch.stack(parts).mean()
        if loss.beta > 0:
            with mixed:
                scores = logits(decoder, _rows(final, batch.supervised))
            sums["cross_entropy"] = cross_entropy_sum(scores, batch.labels)
        if loss.gamma > 0:
            assert batch.final is not None
            aligned = _rows(final, batch.aligned)
            sums["divergence"] = chunked_sum(self._divergence, aligned, batch.final, chunk=CHUNK)
        return sums

    def _gather(self, examples: list[int]) -> MicroBatch:
        return gathered(self.supervision, examples, self._device)

    def _alignment(self, h: Tensor, target: Tensor, lengths: list[int]) -> Tensor:
        """Sum of the objective over the rows of one target: h (N, D_S), target (N, D_T)."""
        data = self.supervision
        if self._objective.uses_map:
            assert data.transport is not None
            return self._objective.sum(h, data.transport(target), lengths, None)
        assert data.heads is not None
        return self._objective.sum(h, target, lengths, [head.weight for head in data.heads])

    def _divergence(self, final: Tensor, final_teacher: Tensor) -> Tensor:
        assert self.supervision.heads is not None
        student, teacher = self.supervision.heads
        return kl_divergence_sum(student.logits(final), teacher.logits(final_teacher))

    def _aligned(self, example: Tokens) -> slice | list[int]:
        return example.align_positions(self.supervision.positions)

    @property
    def _dtype(self) -> torch.dtype:
        """The frozen weights': trained ones may differ, and the store too."""
        return next(p.dtype for p in self.model.parameters() if not p.requires_grad)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _rows(states: Tensor, places: Tensor) -> Tensor:
    """Rows (N, D) of states (B, T, D) at places that count through the batch."""
    return states.flatten(0, 1).index_select(0, places)
