"""Layer Gradient x Activation (section 4.1) one layer at a time, by autograd alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def layer_score(
    forward: Callable[[Tensor], Tensor], layer: nn.Module, inputs_embeds: Tensor, how: str
) -> float:
    """Hold on to the layer's output, differentiate the loss by it, multiply, add up in a loop."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    loss = forward(inputs_embeds.detach().clone().requires_grad_())
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, outputs[0])
    total = 0.0
    for g, h in zip(
        gradient.double().flatten().tolist(), outputs[0].double().flatten().tolist(), strict=True
    ):
        total += abs(g * h) if how == "abs_sum" else g * h
    return total
