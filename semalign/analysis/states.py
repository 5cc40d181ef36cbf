"""Hidden states of a model at all aligned positions of all examples, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from semalign.data.batches import pad, position_mask
from semalign.data.tokens import Tokens
from semalign.models.decoder import capture, find_decoder, run_base


def hidden_states(
    model: nn.Module,
    tokens: Sequence[Tokens],
    states: Sequence[tuple[int, str]],
    *,
    batch_size: int,
) -> Iterator[list[Tensor]]:
    """Each state (layer, interface) at the N positions of one batch after the other: (N, D) each.

    Padding is left out, and positions are in the order of the examples.
    """
    decoder = find_decoder(model)
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        ids, mask = pad(batch, pad_id=0)
        with capture(decoder, states) as captured:
            run_base(decoder, ids, mask)
        where = position_mask(batch, lambda e: e.align_positions("all"), ids.shape[1])
        yield [captured[state][where.to(captured[state].device)] for state in states]
