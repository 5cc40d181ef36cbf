"""The losses of layer-targeted adaptation (section 4.3, Eq. 3-5).

B batch, T position, D width, N rows (supervised positions of all examples), V vocabulary. All
accumulate in float32 (float64 for float64 inputs), whatever the inputs' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

Mask = Bool[Tensor, "B T"] | Num[Tensor, "B T"]  # 0 or 1


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def masked_mean(values: Float[Tensor, "B T"], mask: Mask) -> Float[Tensor, ""]:
    """mavg (section 4.3): mean of the values where the mask is set; 0 if it is nowhere set."""
    chosen = mask.bool()
    # where, not a product: a NaN at a padding position must not reach the sum
    total = torch.where(chosen, _wide(values), 0.0).sum()
    return total / chosen.sum().clamp(min=1)


def cosine_alignment_loss(
    h: Float[Tensor, "B T D"],
    target: Float[Tensor, "B T D"],
    mask: Mask,
) -> Float[Tensor, ""]:
    """L_cos = 1 - mavg(cos(h, target)) (Eq. 3). No gradient enters the target."""
    cosine = F.cosine_similarity(_wide(h), _wide(target.detach()), dim=-1)
    return 1 - masked_mean(cosine, mask)


def cosine_sum(h: Float[Tensor, "N D"], target: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Sum of the cosines of N rows.

    L_cos = 1 - (sum over all micro-batches and workers) / max(1, their number of positions).
    """
    return F.cosine_similarity(_wide(h), _wide(target.detach()), dim=-1).sum()


def cross_entropy_sum(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Sum over N supervised positions of -log softmax(logits)[label]."""
    return F.cross_entropy(_wide(logits), labels, reduction="sum")


def supervised_cross_entropy(
    logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]
) -> Float[Tensor, ""]:
    """L_CE (Eq. 4): mean over the supervised positions.

    The paper prints one index set Omega for all B sequences; examples differ in length, so we take
    the union of their positions: B |Omega| = N.
    """
    return cross_entropy_sum(logits, labels) / max(1, len(labels))


def transfer_loss(
    cosine: Float[Tensor, ""], cross_entropy: Float[Tensor, ""], *, alpha: float, beta: float
) -> Float[Tensor, ""]:
    """L = alpha L_cos + beta L_CE (Eq. 5)."""
    return alpha * cosine + beta * cross_entropy
