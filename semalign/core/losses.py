"""The losses of layer-targeted adaptation (section 4.3, Eq. 3-5), and alternatives to its cosine.

B batch, T position, D width (D_S of the student, D_T of the teacher), N rows (positions of all
examples), V vocabulary. All accumulate in float32 (float64 for float64 inputs), whatever the
inputs' dtype. A `.._sum` adds up over rows or sequences, so that micro-batches and workers can be
added before the division; no gradient enters what comes from the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from semalign.core.similarity import linear_cka
from semalign.registry import Registry

Term = Float[Tensor, ""] | float
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


def chunked_sum(
    part: Callable[..., Float[Tensor, ""]], *rows: Float[Tensor, "N _"], chunk: int
) -> Float[Tensor, ""]:
    """Sum of part(*rows[i : i + chunk]) over all chunks of rows; part itself is a sum over rows.

    The intermediate tensors of part (logits, chunk x V) are freed after each chunk and computed
    again in the backward pass: memory of one chunk for one more forward computation of part.
    """
    total = _wide(rows[0].new_zeros(()))
    for pieces in zip(*(tensor.split(chunk) for tensor in rows), strict=True):
        total = total + checkpoint(part, *pieces, use_reentrant=False, preserve_rng_state=False)
    return total


def fisher_sum(
    h: Float[Tensor, "N D_S"],
    target: Float[Tensor, "N D_T"],
    student_head: Float[Tensor, "V D_S"],
    teacher_head: Float[Tensor, "V D_T"],
    *,
    chunk: int = 256,
) -> Float[Tensor, ""]:
    """Sum over N rows of 1/2 (z - z*)^T (diag p - p p^T) (z - z*), with z = W_S h, z* = W_T h^T and
    p = softmax(z*); row v of both heads is the same token.

    Ours, not the paper's: the second-order term of KL(p || softmax z) around z = z*, with the
    Fisher information of the softmax as its metric. L_fisher is this over N. `target` is the
    teacher's own h^T: both heads read their own space, so no map is needed.
    Cost: 2 N V (D_S + D_T) operations, twice when there is a backward pass; memory: chunk x V.
    """

    def part(h: Tensor, target: Tensor) -> Tensor:
        z = F.linear(h.to(student_head.dtype), student_head)
        return _half_variance(z, F.linear(target.to(teacher_head.dtype), teacher_head))

    return chunked_sum(part, h, target.detach(), chunk=chunk)


def _half_variance(z: Tensor, z_target: Tensor) -> Tensor:
    """d^T (diag p - p p^T) d is the variance of the entries of d = z - z* under p: 2 V operations a
    row, no V x V matrix.
    """
    z_target = _wide(z_target.detach())
    p = z_target.softmax(dim=-1)
    difference = _wide(z) - z_target
    mean = (p * difference).sum(dim=-1, keepdim=True)
    return (p * (difference - mean).square()).sum() / 2


def geometry_sum(
    h: Float[Tensor, "N D1"], target: Float[Tensor, "N D2"], lengths: Sequence[int]
) -> Float[Tensor, ""]:
    """Sum over sequences of 1 - <K, K*> / (|K| |K*|), for the centred token-by-token Gram matrices
    K of h and K* of target: one minus the linear CKA over the tokens of a sequence.

    `lengths`: rows of each sequence, in order; one of fewer than 2 rows has no geometry and adds
    nothing, so that L_geometry is this over max(1, the number of the others). Ours, not the
    paper's. It is 0 where distances between tokens agree up to one scale, whatever the rotation.
    Cost a sequence: as `linear_cka` of its T rows, whichever of T x T and D x D is smaller.
    """
    total = _wide(h.new_zeros(()))
    parts = zip(h.split(list(lengths)), target.detach().split(list(lengths)), strict=True)
    for rows, rows_target in parts:
        if len(rows) >= 2:
            total = total + (1 - linear_cka(rows, rows_target)).to(total.dtype)
    return total


def kl_divergence_sum(
    student_logits: Float[Tensor, "N V"], teacher_logits: Float[Tensor, "N V"]
) -> Float[Tensor, ""]:
    """Sum over N rows of KL(teacher || student) = sum_v p_v (log p_v - log q_v), for p and q the
    softmax of the teacher's and the student's logits over the same V tokens. L_KL is this over N.
    """
    log_p = _wide(teacher_logits.detach()).log_softmax(dim=-1)
    log_q = _wide(student_logits).log_softmax(dim=-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def cross_entropy_sum(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Sum over N supervised positions of -log softmax(logits)[label]."""
    return F.cross_entropy(_wide(logits), labels, reduction="sum")


def supervised_cross_entropy(
    logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]
) -> Float[Tensor, ""]:
    """L_CE (Eq. 4): mean over the supervised positions.

    The paper has one index set Omega for all B sequences; examples differ in length, so we take
    the union of their positions: B |Omega| = N.
    """
    return cross_entropy_sum(logits, labels) / max(1, len(labels))


@dataclass(frozen=True)
class Objective:
    """An alignment loss L_align as a sum over the rows of one target.

    `sum(h, target, lengths, heads)`: h (N, D_S) of the student; target (N, D_S) mapped to the
    student's space or, with `heads`, (N, D_T) as the teacher computed it; `lengths` are the rows of
    each sequence; `heads` the LM heads of student (V, D_S) and teacher (V, D_T) over the shared
    vocabulary, or None. The loss is that sum over the number of rows or, `per_sequence`, of
    sequences of at least two rows.
    """

    sum: Callable[..., Float[Tensor, ""]]
    description: str
    uses_heads: bool = False
    per_sequence: bool = False

    @property
    def uses_map(self) -> bool:
        """Whether the teacher's rows have to be brought to the student's space."""
        return not self.uses_heads


OBJECTIVES: Registry[Objective] = Registry("objective")


def register_objective(name: str, objective: Objective) -> None:
    """Add an alignment loss: `loss.objective=<name>` in a configuration then uses it."""
    OBJECTIVES.register(name, objective)


register_objective(
    "cosine",
    Objective(
        lambda h, target, lengths, heads: len(h) - cosine_sum(h, target),
        "1 - cosine of the student's rows and the mapped ones of the teacher (Eq. 3)",
    ),
)
register_objective(
    "fisher",
    Objective(
        lambda h, target, lengths, heads: fisher_sum(h, target, *heads),
        "distance of both states' logits in the Fisher metric of the teacher's softmax",
        uses_heads=True,
    ),
)
register_objective(
    "geometry",
    Objective(
        lambda h, target, lengths, heads: geometry_sum(h, target, lengths),
        "1 - linear CKA over the tokens of each sequence",
        per_sequence=True,
    ),
)


def transfer_loss(
    *,
    alpha: float,
    beta: float,
    gamma: float,
    alignment: Term = 0.0,
    cross_entropy: Term = 0.0,
    divergence: Term = 0.0,
) -> Term:
    """L = alpha L_align + beta L_CE + gamma L_KL; a term that was not computed is left out.

    Eq. 5 where L_align is L_cos and gamma is 0.
    """
    return alpha * alignment + beta * cross_entropy + gamma * divergence
