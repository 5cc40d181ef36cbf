"""Eq. 3-5 to the letter: loops over batch and positions, no tensor operation but the norms."""

from __future__ import annotations

import math

from torch import Tensor


def cosine_alignment_loss(h: Tensor, target: Tensor, mask: Tensor) -> float:
    """Eq. 3 with mavg written out."""
    total, count = 0.0, 0.0
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            if float(mask[b, t]) == 0:
                continue
            x, y = h[b, t].double().tolist(), target[b, t].double().tolist()
            inner = sum(i * j for i, j in zip(x, y, strict=True))
            norms = math.sqrt(sum(i * i for i in x)) * math.sqrt(sum(j * j for j in y))
            total += inner / norms
            count += 1
    return 1 - total / max(1.0, count)


def supervised_cross_entropy(logits: Tensor, labels: Tensor, omega: list[int]) -> float:
    """Eq. 4 for logits (B, T, V), labels (B, T) and one index set shared by all sequences."""
    total = 0.0
    for b in range(logits.shape[0]):
        for t in omega:
            z = logits[b, t].double().tolist()
            total += math.log(math.exp(z[int(labels[b, t])]) / sum(math.exp(v) for v in z))
    return -total / (logits.shape[0] * len(omega))


def transfer_loss(cosine: float, cross_entropy: float, alpha: float, beta: float) -> float:
    """Eq. 5."""
    return alpha * cosine + beta * cross_entropy
