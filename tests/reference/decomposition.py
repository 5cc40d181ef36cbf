"""Section 3.2 to the letter: one vector, one atom at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.alignment import cosine


def resultant(r: Tensor, atoms: Sequence[Tensor]) -> Tensor:
    """The sum of proj(r, s_i) = (r . s_i / s_i . s_i) s_i; a zero atom has no direction."""
    total = torch.zeros_like(r)
    for s in atoms:
        if s @ s > 0:
            total += (r @ s) / (s @ s) * s
    return total


def dual_frame(atoms: Sequence[Tensor]) -> list[Tensor]:
    """d_i = F^-1 s_i, for F = sum of s_i s_i^T."""
    operator = torch.stack([torch.outer(s, s) for s in atoms]).sum(dim=0)
    inverse = torch.linalg.inv(operator)
    return [inverse @ s for s in atoms]


def dual_resultant(r: Tensor, atoms: Sequence[Tensor], duals: Sequence[Tensor]) -> Tensor:
    """The sum of <r, d_i> s_i."""
    total = torch.zeros_like(r)
    for s, d in zip(atoms, duals, strict=True):
        total += (r @ d) * s
    return total


def output_atoms(head: Tensor) -> list[Tensor]:
    """The columns of the LM head's pseudoinverse, head (m, D)."""
    return list(torch.linalg.pinv(head.double()).T)


def cosines(states: Sequence[Tensor], atoms: Sequence[Tensor], how: str) -> list[float]:
    """cos(r, resultant) of each state, by the map `cosine` or `dual`."""
    states = [r.double() for r in states]
    if how == "cosine":
        return [cosine(r, resultant(r, atoms)) for r in states]
    duals = dual_frame(atoms)
    return [cosine(r, dual_resultant(r, atoms, duals)) for r in states]
