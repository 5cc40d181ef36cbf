"""From the teacher's latent space to the student's (section 4.2, Eq. 1-2).

D_S, D_T widths of student and teacher, V shared vocabulary (column i of both bases is one token).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from semalign.core.bases import pseudoinverse
from semalign.errors import UserError


def semantic_coefficients(
    h: Float[Tensor, "*rows D_T"], bases: Float[Tensor, "D_T V"]
) -> Float[Tensor, "*rows V"]:
    """a_i = cos(h, s_i) (Eq. 1), for unit columns s_i; 0 for h = 0."""
    return _direction(h, bases.dtype) @ bases


def recompose(
    coefficients: Float[Tensor, "*rows V"],
    bases: Float[Tensor, "D_S V"],
    *,
    top_k: int | None = None,
) -> Float[Tensor, "*rows D_S"]:
    """h~ = S_S a (Eq. 2). `top_k` keeps the k coefficients largest in magnitude (the strength)."""
    if top_k is not None:
        size = coefficients.shape[-1]
        if not 1 <= top_k <= size:
            raise UserError(f"top_k {top_k} is out of range: there are 1..{size} semantic atoms")
        kept = coefficients.abs().topk(top_k, dim=-1).indices
        values = coefficients.gather(-1, kept)
        coefficients = torch.zeros_like(coefficients).scatter(-1, kept, values)
    return coefficients @ bases.T


def cosine_map(
    student_bases: Float[Tensor, "D_S V"], teacher_bases: Float[Tensor, "D_T V"]
) -> Float[Tensor, "D_S D_T"]:
    """M = S_S S_T^T: Eq. 1 then Eq. 2 as one matrix, h~ = S_S a = S_S S_T^T h / |h|.

    Costs 2 V D_S D_T operations once, then 2 D_S D_T a token instead of 2 V (D_S + D_T).
    """
    return student_bases @ teacher_bases.T


def dual_map(
    student_head: Float[Tensor, "V D_S"], teacher_head: Float[Tensor, "V D_T"]
) -> Float[Tensor, "D_S D_T"]:
    """W_S^+ W_T: the student's least-squares h~ with the teacher's logits, W_S h~ ~ W_T h.

    Ours, not the paper's: the expansion in the frame s_i with its dual frame, exact where Eq. 1-2
    is not. The identity when teacher = student (and the head has full column rank).
    """
    exact = student_head.dtype == torch.float64 or teacher_head.dtype == torch.float64
    product = pseudoinverse(student_head) @ teacher_head.to(torch.float64)
    return product.to(torch.float64 if exact else torch.float32)


def align(
    h: Float[Tensor, "*rows D_T"], matrix: Float[Tensor, "D_S D_T"], *, normalise: bool
) -> Float[Tensor, "*rows D_S"]:
    """h~ = M h / |h| (`normalise`, as Eq. 1 has it) or M h, in the map's dtype."""
    return (_direction(h, matrix.dtype) if normalise else h.to(matrix.dtype)) @ matrix.T


def _direction(h: Tensor, dtype: torch.dtype) -> Tensor:
    return F.normalize(h.to(dtype), dim=-1, eps=torch.finfo(dtype).tiny)
