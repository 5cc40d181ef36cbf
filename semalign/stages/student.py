"""The student from its first trained layer up, and the sums that its losses average.

The layers below never change, so their output is read from a store and they are not run; logits are
made at the positions that a term looks at, and no term of weight zero is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from semalign.core.losses import OBJECTIVES, chunked_sum, cross_entropy_sum, kl_divergence_sum
from semalign.data.batches import pad, position_mask
from semalign.data.tokens import Tokens
from semalign.models.decoder import capture, find_decoder, logits, run_base
from semalign.models.partial import run_from
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

    def counts(self, batch: Sequence[int]) -> dict[str, int]:
        """What each term of the loss is averaged over, in a whole batch of examples."""
        loss, tokens = self.supervision.loss, [self.supervision.tokens[e] for e in batch]
        lengths = [_size(self._aligned(example)) for example in tokens]
        sequences = sum(length >= 2 for length in lengths)
        counts = {
            "alignment": sequences if self._objective.per_sequence else sum(lengths),
            "cross_entropy": sum(_size(example.supervised_positions) for example in tokens),
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

    def forward(self, examples: list[int]) -> dict[str, Tensor]:
        """The sum of each term over `examples`; the alignment's is the mean over its targets."""
        data, decoder = self.supervision, self._decoder
        device = next(self.model.parameters()).device
        tokens = [data.tokens[e] for e in examples]
        hidden, mask, ids = self._inputs(examples, device)
        dtype = self._dtype
        where = position_mask(tokens, self._aligned, ids.shape[1]).to(device)
        wanted = [(target.student, target.interface) for target in data.targets]
        # trained weights are float32; products run in the dtype of the others
        mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with mixed, capture(decoder, wanted) as seen:
            if hidden is None:
                final = run_base(decoder, ids, mask)
            else:
                final = run_from(decoder, data.first_layer, hidden, mask)
        sums, loss = {}, data.loss
        if loss.alpha > 0:
            lengths = where.sum(dim=1).tolist()
            parts = [
                self._alignment(seen[key][where], target.rows(examples).to(device), lengths)
                for target, key in zip(data.targets, wanted, strict=True)
            ]
            sums["alignment"] = torch.stack(parts).mean()
        if loss.beta > 0:
            chosen = position_mask(tokens, lambda e: e.supervised_positions, ids.shape[1])
            chosen = chosen.to(device)
            with mixed:
                scores = logits(decoder, final[chosen])
            sums["cross_entropy"] = cross_entropy_sum(scores, ids.roll(-1, 1)[chosen])
        if loss.gamma > 0:
            assert data.final is not None
            teacher = torch.cat([data.final[e] for e in examples]).to(device)
            sums["divergence"] = chunked_sum(self._divergence, final[where], teacher, chunk=CHUNK)
        return sums

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

    def _aligned(self, example: Tokens) -> slice:
        return example.align_positions(self.supervision.positions)

    @property
    def _dtype(self) -> torch.dtype:
        """The frozen weights': trained ones may differ, and the store too."""
        return next(p.dtype for p in self.model.parameters() if not p.requires_grad)

    def _inputs(
        self, examples: list[int], device: torch.device
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The first trained layer's input (B, T, D) if it is stored, mask and ids (B, T)."""
        data = self.supervision
        ids, mask = pad([data.tokens[e] for e in examples], 0)
        if data.inputs is None:
            return None, mask.to(device), ids.to(device)
        rows = [data.inputs[e] for e in examples]
        hidden = torch.zeros((*ids.shape, rows[0].shape[1]), dtype=self._dtype)
        for i, row in enumerate(rows):
            hidden[i, : len(row)] = row
        return hidden.to(device), mask.to(device), ids.to(device)


def _size(where: slice) -> int:
    return int(where.stop - where.start)
