"""A decoder's layers: find them, capture what they compute, run them, verify their structure.

Two families share the shape `x = x + attn(..); x = x + mlp(..)` found here:
  pre-norm (Llama, Mistral, Qwen2, Qwen3, Gemma): the sublayer outputs are those of
      `self_attn.o_proj` and of `mlp`;
  post-norm (Gemma2, Gemma3, OLMo2, GLM4): a norm follows each sublayer BEFORE the residual
      addition, and its output is what is added.
Layer numbers here are 0-based; B batch, T position, D width, V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from semalign.core.pairing import paper_number
from semalign.errors import UserError, nearest

INTERFACES = ("block", "attn", "mlp")

# The norm between a sublayer and its residual addition. `post_attention_layernorm` alone is the
# norm BEFORE the MLP in pre-norm families, so it counts only with `post_feedforward_layernorm`.
_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)


class PassThrough(nn.Module):
    """Replaces a layer: returns its input, and has no parameters.

    It keeps the plain attributes of the layer (such as Qwen2's `attention_type`) that a model reads
    in its loop over the layers.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for key, value in vars(layer).items():
            if not key.startswith("_") and isinstance(value, str | int | float | bool):
                setattr(self, key, value)

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The parts of a causal language model. `base` is the model without its LM head."""

    model: nn.Module
    base: nn.Module
    layers: nn.ModuleList
    embed: nn.Module
    norm: nn.Module
    lm_head: nn.Linear
    softcap: float | None  # logits become softcap * tanh(logits / softcap) (Gemma2)


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of a causal language model, found by structure, inside a PEFT wrapper too.

    **Raises** `UserError` if there is no LM head, or no single stack of layers with
    `self_attn.o_proj` and `mlp` between `embed_tokens` and `norm`.
    """
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    found = [module for module in model.modules() if _is_decoder_stack(module)]
    if len(found) != 1:
        raise UserError(
            f"{name} has not the shape of a Llama-like decoder: expected one module with "
            f"embed_tokens, norm and layers that have self_attn.o_proj and mlp, found {len(found)}"
        )
    base = found[0]
    heads = (getattr(module, "lm_head", None) for module in model.modules())
    lm_head = next((h for h in heads if isinstance(getattr(h, "base_layer", h), nn.Linear)), None)
    if lm_head is None:
        raise UserError(f"{name} has no LM head (lm_head), so its vocabulary has no semantic bases")
    return Decoder(
        model=model,
        base=base,
        layers=base.layers,
        embed=base.embed_tokens,
        norm=base.norm,
        lm_head=lm_head,
        softcap=getattr(base.config, "final_logit_softcapping", None),
    )


def _is_decoder_stack(module: nn.Module) -> bool:
    layers = getattr(module, "layers", None)
    return (
        isinstance(layers, nn.ModuleList)
        and len(layers) > 0
        and isinstance(getattr(module, "embed_tokens", None), nn.Module)
        and isinstance(getattr(module, "norm", None), nn.Module)
        and all(isinstance(layer, PassThrough) or _has_sublayers(layer) for layer in layers)
    )


def _has_sublayers(layer: nn.Module) -> bool:
    attention = getattr(layer, "self_attn", None)
    return hasattr(layer, "mlp") and isinstance(getattr(attention, "o_proj", None), nn.Module)


def sublayer(layer: nn.Module, interface: str) -> nn.Module:
    """The module whose output tensor (B, T, D) is that of the interface, before residual addition.

    `block` is the whole layer (its output includes the residual stream). Call this after an adapter
    is added, not before: PEFT replaces modules.
    """
    if interface == "block":
        return layer
    if interface not in INTERFACES:
        raise UserError(f"interface '{interface}' is unknown: {nearest(interface, INTERFACES)}")
    for attn_norm, mlp_norm in _POST_NORMS:
        if hasattr(layer, attn_norm) and hasattr(layer, mlp_norm):
            return getattr(layer, attn_norm if interface == "attn" else mlp_norm)
    return layer.self_attn.o_proj if interface == "attn" else layer.mlp


@contextmanager
def capture(
    decoder: Decoder, wanted: Sequence[tuple[int, str]]
) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Within the context, every forward pass fills the dict: {(layer, interface): (B, T, D)}.

    Interfaces: `block`, `attn`, `mlp` (outputs, see `sublayer`), `input` (the block's input) and,
    of the last layer, `final` (its output after the last norm, which is the LM head's input).
    The tensors stay in the autograd graph. No hook survives the context, even after an exception.
    `partial.stopping_after` and `load_model(num_layers=..)` spare the layers that are not needed.
    """
    captured: dict[tuple[int, str], Tensor] = {}
    with ExitStack() as hooks:
        for layer, interface in wanted:
            key = (layer, interface)
            if interface == "input":
                handle = decoder.layers[layer].register_forward_pre_hook(
                    _record_input(captured, key), with_kwargs=True
                )
            else:
                module = _captured_module(decoder, layer, interface)
                handle = module.register_forward_hook(_record_output(captured, key))
            hooks.callback(handle.remove)
        yield captured


def _captured_module(decoder: Decoder, layer: int, interface: str) -> nn.Module:
    """The module whose output is that of the interface."""
    if interface != "final":
        return sublayer(decoder.layers[layer], interface)
    if layer != len(decoder.layers) - 1:
        raise UserError(
            f"interface 'final' of layer {paper_number(layer)} (counted from 1): only the last of "
            f"the {len(decoder.layers)} layers has one"
        )
    return decoder.norm


def _record_output(captured: dict[tuple[int, str], Tensor], key: tuple[int, str]) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        captured[key] = output[0] if isinstance(output, tuple) else output

    return hook


def _record_input(captured: dict[tuple[int, str], Tensor], key: tuple[int, str]) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        captured[key] = args[0] if args else kwargs["hidden_states"]

    return hook


def run_base(decoder: Decoder, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Final hidden states after the last norm (B, T, D) of ids (B, T); no LM head.

    Padding must be on the right: positions count from the first column.
    """
    ids, attention_mask = (
        to_device_of(decoder.embed, ids),
        to_device_of(decoder.embed, attention_mask),
    )
    output = decoder.base(input_ids=ids, attention_mask=attention_mask, use_cache=False)
    return output.last_hidden_state


def to_device_of(module: nn.Module, x: Tensor) -> Tensor:
    """x on the module's device. Offloaded weights are on `meta`: accelerate then moves inputs."""
    device = next(module.parameters()).device
    return x if device.type == "meta" else x.to(device)


def logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Next-token logits (..., V) of final-normed hidden states (..., D)."""
    scores = decoder.lm_head(to_device_of(decoder.lm_head, hidden))
    return capped(scores, decoder.softcap)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Gemma2's softcap * tanh(scores / softcap); the scores themselves without a softcap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


@torch.no_grad()
def verify_structure(decoder: Decoder) -> None:
    """Check on 4 tokens that block_in + attn + mlp = block_out and that the LM head gives logits.

    **Raises** `UserError` if they do not (a scaled residual, for example).
    """
    name = type(decoder.base).__name__
    ids = torch.arange(1, 5)[None] % decoder.lm_head.weight.shape[0]
    ids = to_device_of(decoder.embed, ids)
    mask = torch.ones_like(ids)
    parts = ("input", "attn", "mlp", "block")
    wanted = [(layer, part) for layer in range(len(decoder.layers)) for part in parts]
    with capture(decoder, wanted) as captured:
        hidden = run_base(decoder, ids, mask)
    for layer in range(len(decoder.layers)):
        block_in, attn, mlp, block_out = (captured[layer, part] for part in parts)
        if not block_in.shape == attn.shape == mlp.shape:
            raise UserError(
                f"{name} layer {paper_number(layer)} (counted from 1): its sublayers give "
                f"{attn.shape[-1]} and {mlp.shape[-1]} numbers a token, the residual stream has "
                f"{block_in.shape[-1]}; expected the same"
            )
        parts_in = [part.to(block_out.device) for part in (block_in, attn, mlp)]
        magnitude = sum(part.abs() for part in parts_in)
        if not _equal_up_to_rounding(sum(parts_in), block_out, magnitude):
            raise UserError(
                f"{name} layer {paper_number(layer)} (counted from 1) does not compute "
                "block_in + attn + mlp = block_out; expected a plain residual stream"
            )
    expected = decoder.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = logits(decoder, hidden).to(expected.device)
    if not _equal_up_to_rounding(found, expected, 8 * expected.abs().max()):
        raise UserError(f"{name}: the LM head does not turn the last hidden state into the logits")


def _equal_up_to_rounding(ours: Tensor, theirs: Tensor, magnitude: Tensor) -> bool:
    """Equal up to the rounding of a few additions of numbers of that magnitude in their dtype."""
    if ours.shape != theirs.shape:
        return False
    return bool(((ours - theirs).abs() <= 4 * torch.finfo(theirs.dtype).eps * magnitude).all())
