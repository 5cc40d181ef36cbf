"""Semantic bases: one direction of the latent space per vocabulary entry (section 3.1).

D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from semalign.errors import UserError

# Largest error of G^-1 G accepted from the Cholesky factor of the Gram matrix G. It grows like
# eps * cond(W)^2, so this admits condition numbers of W up to about 1e5.
_MAX_RESIDUAL = 1e-6


def pseudoinverse(weight: Float[Tensor, "V D"]) -> Float[Tensor, "D V"]:
    """Moore-Penrose pseudoinverse W^+ of an LM head, in float64, on the weight's device.

    For W of full column rank W^+ = (W^T W)^-1 W^T: one Cholesky factorisation of the D x D Gram
    matrix, about 4 V D^2 + D^3/3 operations, where an SVD needs some 10 times as many. If the
    factorisation fails or its residual is too large (rank-deficient or ill-conditioned head,
    V < D), an SVD takes over.

    **Raises** `UserError` for NaN or infinite weights.
    """
    wide = weight.detach().to(torch.float64)
    if not wide.isfinite().all():
        raise UserError("the LM head holds NaN or infinite values: it has no semantic bases")
    gram = wide.T @ wide
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed.item() == 0:
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        residual = (torch.cholesky_solve(gram, factor) - identity).abs().max()
        if residual < _MAX_RESIDUAL:  # False for NaN
            return torch.cholesky_solve(wide.T, factor)
    return _pseudoinverse_by_svd(wide, rtol=_relative_cutoff(weight))


def _relative_cutoff(weight: Tensor) -> float:
    """Singular values below this share of the largest are rounding noise of the weight's dtype."""
    if weight.dtype == torch.float64:
        return max(weight.shape) * torch.finfo(torch.float64).eps
    return 1e-6  # a little above the float32 epsilon; meets the Cholesky limit, so no jump


def _pseudoinverse_by_svd(weight: Tensor, *, rtol: float) -> Tensor:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    kept = s > rtol * s.max()
    return vh[kept].T @ (u[:, kept] / s[kept]).T


def semantic_bases(weight: Float[Tensor, "V D"]) -> Float[Tensor, "D V"]:
    """The semantic bases of an LM head: columns s_i = W^+ e_i at unit length (sections 3.1, 4.2).

    float32 (float64 for a float64 head). A vocabulary entry with a zero row has a zero column.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return F.normalize(pseudoinverse(weight), dim=0, eps=1e-30).to(dtype)
