"""Sections 3.1 and 4.2 to the letter: one token, one atom at a time, with torch.linalg.pinv."""

from __future__ import annotations

import torch
from torch import Tensor


def semantic_bases(head: Tensor) -> Tensor:
    """s_i = e_i W^+ at unit length, as columns (D, V). `head` is (V, D) as Hugging Face stores it.

    The paper's W maps representations to logits as r W, so it is the transpose (D, V).
    """
    inverse = torch.linalg.pinv(head.double().T)  # (V, D)
    bases = torch.zeros(head.shape[1], head.shape[0], dtype=torch.float64)
    for i in range(head.shape[0]):
        one_hot = torch.zeros(head.shape[0], dtype=torch.float64)
        one_hot[i] = 1.0
        s = one_hot @ inverse
        bases[:, i] = s / s.norm() if s.norm() > 0 else s
    return bases


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


def coefficients(h: Tensor, teacher_bases: Tensor) -> Tensor:
    """Eq. 1 for one vector h (D_T,)."""
    a = [cosine(h, teacher_bases[:, i]) for i in range(teacher_bases.shape[1])]
    return torch.tensor(a, dtype=torch.float64)


def recompose(a: Tensor, student_bases: Tensor, top_k: int | None = None) -> Tensor:
    """Eq. 2 for one vector of coefficients (V,): the sum of a_i s_i over the strongest atoms."""
    atoms = sorted(range(len(a)), key=lambda i: abs(float(a[i])), reverse=True)
    result = torch.zeros(student_bases.shape[0], dtype=torch.float64)
    for i in atoms if top_k is None else atoms[:top_k]:
        result += a[i] * student_bases[:, i]
    return result


def dual(h: Tensor, student_head: Tensor, teacher_head: Tensor) -> Tensor:
    """Least-squares student vector with the teacher's logits, for one vector h (D_T,)."""
    logits = teacher_head.double() @ h.double()
    return torch.linalg.lstsq(student_head.double(), logits[:, None]).solution[:, 0]
