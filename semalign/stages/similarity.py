"""How alike the layers of two models are on the same examples: linear CKA (section 5.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from semalign.core.similarity import MinibatchCKA
from semalign.data.batches import pad
from semalign.data.tokens import Tokens
from semalign.models.decoder import Decoder, capture, find_decoder, run_base

_ROWS = 512  # of a batch, so that all layers of both models fit in memory in float64


@torch.inference_mode()
def layer_similarity(
    teacher: nn.Module,
    student: nn.Module,
    teacher_tokens: Sequence[Tokens],
    student_tokens: Sequence[Tokens],
    *,
    batch_size: int,
) -> list[list[float]]:
    """CKA of the block outputs: a row a teacher layer, a column a student layer, from 0.

    The same examples in either model's ids, position for position; batches of `batch_size` of them
    in an order that is always the same, of each batch at most 512 positions drawn at random.
    Cost: a forward pass of both models, and what MinibatchCKA says. Raises UserError for a batch of
    less than 4 positions.
    """
    decoders = find_decoder(teacher), find_decoder(student)
    device = next(student.parameters()).device
    cka = MinibatchCKA(*(len(decoder.layers) for decoder in decoders))
    generator = torch.Generator().manual_seed(0)
    for batch in torch.randperm(len(student_tokens), generator=generator).split(batch_size):
        count = sum(len(student_tokens[e].ids) for e in batch)
        rows = torch.randperm(count, generator=generator)[:_ROWS]
        cka.update(
            *(
                [block.to(device) for block in _blocks(decoder, [tokens[e] for e in batch], rows)]
                for decoder, tokens in zip(decoders, (teacher_tokens, student_tokens), strict=True)
            )
        )
    return cka.matrix().tolist()


def _blocks(decoder: Decoder, tokens: Sequence[Tokens], rows: Tensor) -> list[Tensor]:
    """What every layer says at `rows` of the examples' positions, counted through: (N, D) each."""
    ids, mask = pad(tokens, pad_id=0)
    wanted = [(layer, "block") for layer in range(len(decoder.layers))]
    with capture(decoder, wanted) as seen:
        run_base(decoder, ids, mask)
    places = mask.flatten().nonzero()[:, 0][rows]
    return [seen[key].flatten(0, 1)[places.to(seen[key].device)] for key in wanted]
