"""Eq. 3-5 to the letter, and the alternatives to Eq. 3: loops over batch, positions, vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.similarity import linear_cka


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


def softmax(z: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def fisher(h: Tensor, target: Tensor, student_head: Tensor, teacher_head: Tensor) -> float:
    """Mean over rows of 1/2 (z - z*)^T F (z - z*), F = diag p - p p^T written out."""
    total = 0.0
    for row in range(len(h)):
        z = student_head.double() @ h[row].double()
        z_target = teacher_head.double() @ target[row].double()
        p = torch.tensor(softmax(z_target.tolist()), dtype=torch.float64)
        metric = torch.diag(p) - torch.outer(p, p)
        total += 0.5 * float((z - z_target) @ metric @ (z - z_target))
    return total / len(h)


def geometry(h: Tensor, target: Tensor, mask: Tensor) -> float:
    """Mean of 1 - CKA over the sequences of (B, T, D) that have two tokens under the mask."""
    losses = []
    for b in range(h.shape[0]):
        kept = [t for t in range(h.shape[1]) if float(mask[b, t]) != 0]
        if len(kept) >= 2:
            losses.append(1 - linear_cka(h[b, kept], target[b, kept]))
    return sum(losses) / max(1, len(losses))


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Mean over rows of KL(teacher || student)."""
    total = 0.0
    for row in range(len(student_logits)):
        p = softmax(teacher_logits[row].double().tolist())
        q = softmax(student_logits[row].double().tolist())
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    return total / len(student_logits)


def transfer_loss(
    alignment: float,
    cross_entropy: float,
    divergence: float,
    alpha: float,
    beta: float,
    gamma: float,
) -> float:
    """Eq. 5 with a third term."""
    return alpha * alignment + beta * cross_entropy + gamma * divergence
