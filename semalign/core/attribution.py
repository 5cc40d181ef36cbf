"""One importance score per layer by Layer Gradient x Activation (section 4.1).

B batch, T position, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from semalign.errors import UserError, nearest

AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs_sum": lambda attribution: attribution.abs().sum(),
    "sum": lambda attribution: attribution.sum(),
}


def aggregate(attribution: Float[Tensor, "B T D"], how: str) -> Float[Tensor, ""]:
    """Sum over tokens and channels of |gradient x activation| (`abs_sum`) or as signed (`sum`), in
    float64.
    """
    if how not in AGGREGATIONS:
        raise UserError(f"attribution aggregation '{how}' is unknown: {nearest(how, AGGREGATIONS)}")
    return AGGREGATIONS[how](attribution.double())


def layer_scores(
    forward: Callable[..., Tensor],
    layers: list[nn.Module],
    inputs_embeds: Float[Tensor, "B T D"],
    *,
    args: tuple[Any, ...] = (),
    aggregation: str = "abs_sum",
) -> list[float]:
    """Score of each layer: sum over tokens and channels of dL/dh * h, for the layer's output h.

    **Arguments**: `forward(inputs_embeds, *args)` returns the supervised loss L, a scalar tensor;
    `layers` are modules whose output is one tensor (B, T, D).

    All layers of a device share one forward and one backward pass. Parameters may be frozen: the
    gradient starts at the embeddings. Scores add up over batches if L is a sum over examples.
    """

    def loss(embeds: Tensor, *rest: Any) -> Tensor:
        return forward(embeds, *rest).reshape(1)

    from captum.attr import LayerGradientXActivation  # takes a second to import

    scores = [0.0] * len(layers)
    for indices in _by_device(layers).values():
        method = LayerGradientXActivation(loss, [layers[index] for index in indices])
        embeds = inputs_embeds.detach().clone()
        attributions = method.attribute(embeds, additional_forward_args=args or None)
        found = torch.stack([aggregate(attribution, aggregation) for attribution in attributions])
        for index, score in zip(indices, found.tolist(), strict=True):
            scores[index] = score
    return scores


def _by_device(layers: list[nn.Module]) -> dict[torch.device, list[int]]:
    """Indices of the layers per device: captum takes gradients on one device at a time."""
    groups: dict[torch.device, list[int]] = {}
    for index, layer in enumerate(layers):
        parameter = next(layer.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        groups.setdefault(device, []).append(index)
    return groups


def critical_layers(scores: list[float], n: int) -> list[int]:
    """The n layers (0-based) of the largest |score|, most critical first; ties go to the deeper."""
    if not 1 <= n <= len(scores):
        raise UserError(f"{n} critical layers were asked for: the teacher has 1..{len(scores)}")
    if not all(math.isfinite(score) for score in scores):
        raise UserError("attribution scores are not finite: try teacher dtype float32 or bfloat16")
    order = sorted(range(len(scores)), key=lambda layer: (abs(scores[layer]), layer), reverse=True)
    return order[:n]
