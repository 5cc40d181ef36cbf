"""Seeking to the letter: one gradient, one window, one singular value at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def products(model: nn.Module, ids: Sequence[int], answer: int) -> dict[str, Tensor]:
    """theta * dL/dtheta, signed, in float64 of every parameter; `answer` is where the answer starts
    and L the mean of -log p of its tokens.
    """
    named = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in named.items()}
    model.requires_grad_(True)
    scores = model(input_ids=torch.tensor([list(ids)])).logits[0].double()
    loss = torch.zeros((), dtype=torch.float64)
    for position in range(answer - 1, len(ids) - 1):
        p = scores[position].exp() / scores[position].exp().sum()
        loss = loss - p[ids[position + 1]].log()
    gradients = torch.autograd.grad(loss / (len(ids) - answer), list(named.values()))
    for name, p in named.items():
        p.requires_grad_(flags[name])
    return {
        name: p.detach().double() * g.double()
        for (name, p), g in zip(named.items(), gradients, strict=True)
    }


def sensitivity(
    model: nn.Module, examples: Sequence[tuple[Sequence[int], int]]
) -> dict[str, Tensor]:
    """Sum over examples of the products' magnitudes."""
    totals: dict[str, Tensor] = {}
    for ids, answer in examples:
        for name, product in products(model, ids, answer).items():
            totals[name] = totals.get(name, 0) + product.abs()
    return totals


def layer_score(sensitivities: dict[str, Tensor], layer: int) -> float:
    total = 0.0
    for name, values in sensitivities.items():
        if f".layers.{layer}." in name:
            total += math.fsum(values.flatten().tolist())
    return total


def top_layers(scores: Sequence[float], count: int) -> list[int]:
    """Take the best that is left, `count` times, and put them in order."""
    left = dict(enumerate(scores))
    taken = []
    for _ in range(count):
        best = max(left, key=lambda layer: (left[layer], -layer))
        taken.append(best)
        del left[best]
    return sorted(taken)


def best_window(
    scores: Sequence[Sequence[float]], shape: tuple[int, int]
) -> tuple[int, int, float]:
    """Every window added up by itself; a later one has to be larger to win."""
    rows, columns = shape
    best = (0, 0, -math.inf)
    for i in range(len(scores) - rows + 1):
        for j in range(len(scores[0]) - columns + 1):
            total = math.fsum(scores[i + a][j + b] for a in range(rows) for b in range(columns))
            if total > best[2]:
                best = (i, j, total)
    return best


def low_rank(block: Tensor, rank: int) -> Tensor:
    """sigma_1 u_1 v_1^T + ... + sigma_r u_r v_r^T of a full SVD in float64."""
    u, s, vh = torch.linalg.svd(block.double(), full_matrices=True)
    total = torch.zeros(block.shape, dtype=torch.float64)
    for k in range(min(rank, len(s))):
        total += s[k] * torch.outer(u[:, k], vh[k])
    return total


def matrix_block(weight: Tensor, scores: Tensor, shape: tuple[int, int]) -> Tensor:
    i, j, _ = best_window(scores.tolist(), shape)
    return torch.stack([weight[i + a, j : j + shape[1]] for a in range(shape[0])])


def vocabulary_block(
    weight: Tensor,
    scores: Tensor,
    shape: tuple[int, int],
    student: Sequence[int],
    teacher: Sequence[int],
) -> Tensor:
    """Rows token by token; those of no shared token stay zero."""
    sums = [[math.fsum(scores[t, j].item() for t in teacher) for j in range(scores.shape[1])]]
    _, column, _ = best_window(sums, (1, shape[1]))
    block = torch.zeros(shape, dtype=weight.dtype)
    for s, t in zip(student, teacher, strict=True):
        block[s] = weight[t, column : column + shape[1]]
    return block


def transferred(
    weight: Tensor, pair: tuple[Tensor, Tensor], origin: tuple[Tensor, Tensor]
) -> Tensor:
    """W* = W - B0 A0 + B A as the authors' code makes it: lower the weight, then merge."""
    lowered = weight.double() - origin[0].double() @ origin[1].double()
    return lowered + pair[0].double() @ pair[1].double()
