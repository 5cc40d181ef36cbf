"""Faster LoRA on the CPU for vLLM calls that hold one adapter.

vLLM's CPU kernels gather a copy of the adapter's matrices for every token of the batch, because any
token may have another adapter; generation then takes several times as long as with the base model.
Our calls hold one adapter, so two dense products do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def install() -> None:
    """Replace the three kernels in this process; batches of several adapters still use vLLM's."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name, dense in (
        ("bgmv_shrink", _shrink),
        ("bgmv_expand", _expand),
        ("bgmv_expand_slice", _expand_slice),
    ):
        kernel = _choose(dense, getattr(lora_ops, name))
        for module in (lora_ops, punica_cpu):
            setattr(module, name, kernel)


def _choose(dense: Callable[..., None], gather: Callable[..., None]) -> Callable[..., None]:
    def kernel(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        slots: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        first = int(slots[0]) if len(slots) and len(inputs) == len(output) else -1
        alike = bool((slots == first).all())
        # Where prompts are scored there are more rows than slots; a call has one adapter, or none.
        if alike and first < 0 and len(slots) != len(inputs):
            return
        if first < 0 or not alike:
            gather(inputs, weights, output, slots, *args, **kwargs)
            return
        matrix = weights[first].to(output.dtype)
        matrix = matrix.squeeze(0) if matrix.dim() == 3 else matrix
        dense(inputs.to(output.dtype) @ matrix.T, output, *args, **kwargs)

    return kernel


def _shrink(product: torch.Tensor, output: torch.Tensor, scaling: float = 1.0) -> None:
    output[:, : product.shape[1]] = scaling * product


def _expand(product: torch.Tensor, output: torch.Tensor, add_inputs: bool = True) -> None:
    _expand_slice(product, output, 0, min(product.shape[1], output.shape[1]), add_inputs)


def _expand_slice(
    product: torch.Tensor,
    output: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    target = output[:, slice_offset : slice_offset + slice_size]
    if add_inputs:
        target += product[:, :slice_size]
    else:
        target.copy_(product[:, :slice_size])
