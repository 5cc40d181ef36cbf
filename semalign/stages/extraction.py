"""Run a model as far as the deepest layer asked for and write what it said to the store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from semalign.artifacts.activations import DTYPES, ActivationStore, Column
from semalign.data.batches import length_buckets, pad
from semalign.data.tokens import Tokens
from semalign.models.decoder import capture, find_decoder, run_base


@torch.inference_mode()
def extract_shard(
    model: nn.Module,
    store: ActivationStore,
    shard: int,
    columns: Sequence[Column],
    tokens: Sequence[Tokens],
    *,
    batch_tokens: int,
) -> int:
    """Write `columns` of one shard; returns its row count.

    tokens: the shard's examples, in order. One forward pass serves all columns. The model should
    have been loaded with num_layers = deepest column + 1, so that nothing above it is computed.
    Memory: batch_tokens * D per column on the device, and the shard's rows on the host.
    """
    decoder = find_decoder(model)
    kept: dict[Column, list[torch.Tensor | None]] = {c: [None] * len(tokens) for c in columns}
    device = next(model.parameters()).device
    dtype = DTYPES[store.identity.dtype]
    with capture(decoder, [(column.layer, column.interface) for column in columns]) as seen:
        for batch in length_buckets(tokens, batch_tokens):
            members = [tokens[index] for index in batch]
            ids, mask = pad(members, pad_id=0)
            run_base(decoder, ids.to(device), mask.to(device))
            for column in columns:
                hidden = seen[(column.layer, column.interface)]
                for row, index in enumerate(batch):
                    where = tokens[index].align_positions(store.identity.positions)
                    # clone: a slice would keep the whole padded batch alive
                    kept[column][index] = hidden[row, where].to("cpu", dtype, copy=True)
    rows = 0
    for column, parts in kept.items():
        joined = torch.cat([part for part in parts if part is not None])
        store.write(column, shard, joined)
        rows = len(joined)
    return rows
