"""Run a part of a decoder: from layer k on, or up to layer k."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from semalign.models.decoder import Decoder, PassThrough, to_device_of


@contextmanager
def resume_from(decoder: Decoder, k: int, hidden: Tensor) -> Iterator[None]:
    """Within the context the decoder skips layers < k, and layer k receives `hidden` (B, T, D).

    The model's own forward pass makes masks, positions and rotary embeddings, so that every
    architecture's rules apply. Layer indices do not change.
    """

    def replace_input(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    handle = decoder.layers[k].register_forward_pre_hook(
        replace_input, with_kwargs=True, prepend=True
    )
    try:
        with _passed_through(decoder, range(k)):
            yield
    finally:
        handle.remove()


@contextmanager
def stopping_after(decoder: Decoder, layer: int) -> Iterator[None]:
    """Within the context `run_base` computes layers 0..layer alone, as if the model had no others.

    What is captured, and what `run_base` returns, is equal to the bit to that of the model loaded
    with `num_layers = layer + 1`. Deeper layers are put back at the end, even after an exception.
    """
    with _passed_through(decoder, range(layer + 1, len(decoder.layers))):
        yield


@contextmanager
def _passed_through(decoder: Decoder, indices: range) -> Iterator[None]:
    """Within the context the layers of these indices return their input."""
    replaced = {index: decoder.layers[index] for index in indices}
    try:
        for index, layer in replaced.items():
            decoder.layers[index] = PassThrough(layer)
        yield
    finally:
        for index, layer in replaced.items():
            decoder.layers[index] = layer


def run_from(decoder: Decoder, k: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Final-normed hidden states (B, T, D) from layer k's block input `hidden` (B, T, D).

    Layers < k do not run. Differentiable in `hidden` and in the parameters of layers >= k.
    """
    hidden = to_device_of(decoder.layers[k], hidden)
    attention_mask = to_device_of(decoder.layers[k], attention_mask)
    with resume_from(decoder, k, hidden):
        output = decoder.base(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False)
    return output.last_hidden_state


def drop_prefix(decoder: Decoder, k: int, *, keep_embedding: bool = False) -> Decoder:
    """The decoder without the weights of layers < k and of the embedding, for `run_from` layer k.

    The model itself is changed: `run_base` no longer works on it. A tied LM head keeps the
    embedding's weight in memory.
    """
    for index in range(k):
        decoder.layers[index] = PassThrough(decoder.layers[index])
    if keep_embedding:
        return decoder
    decoder.base.embed_tokens = PassThrough(decoder.embed)
    return replace(decoder, embed=decoder.base.embed_tokens)


def drop_suffix(decoder: Decoder, k: int) -> None:
    """Free the weights of layers > k.

    The outputs of layers <= k stay the same, the final hidden states do not.
    """
    for index in range(k + 1, len(decoder.layers)):
        decoder.layers[index] = PassThrough(decoder.layers[index])
