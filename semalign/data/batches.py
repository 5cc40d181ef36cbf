"""Token sequences as padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from semalign.data.tokens import Tokens


def length_buckets(tokens: Sequence[Tokens], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, at most `batch_tokens` with padding, or one row."""
    batch: list[int] = []
    for index in sorted(range(len(tokens)), key=lambda i: (len(tokens[i].ids), i)):
        if batch and len(tokens[index].ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(tokens: Sequence[Tokens], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T) and attention mask (B, T), both int64."""
    width = max(len(example.ids) for example in tokens)
    ids = torch.full((len(tokens), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(tokens), width), dtype=torch.long)
    for row, example in enumerate(tokens):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
    return ids, mask


def position_mask(
    tokens: Sequence[Tokens], where: Callable[[Tokens], slice | list[int]], width: int
) -> torch.Tensor:
    """(B, T) bool: True at `where(example)` of each row."""
    mask = torch.zeros((len(tokens), width), dtype=torch.bool)
    for row, example in enumerate(tokens):
        mask[row, where(example)] = True
    return mask


def places(
    tokens: Sequence[Tokens], where: Callable[[Tokens], slice | list[int]], width: int
) -> torch.Tensor:
    """(N,) int64: the same positions, counted through the padded batch."""
    return position_mask(tokens, where, width).flatten().nonzero()[:, 0]
