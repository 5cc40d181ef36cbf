"""Planned bytes against the tensors that autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from semalign.models.decoder import Decoder, find_decoder
from semalign.models.loading import attention_implementation
from semalign.models.memory import Batch
from semalign.models.partial import stopping_after
from semalign.models.reference import Model
from semalign.models.shapes import shape_of
from tests.models.architectures import FAMILIES, make_config

ROWS, LENGTH = 2, 64
WIDTHS = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 8, "head_dim": 32}


def config_of(family: str, heads: int) -> Any:
    """A model wide enough that what a norm keeps beside its input does not count."""
    return make_config(family, **WIDTHS, num_key_value_heads=heads)


def saved_bytes(decoder: Decoder, embedded: Tensor, layers: int) -> int:
    """Of all tensors that a pass of the first layers keeps, without parameters."""
    model = [*decoder.model.parameters(), *decoder.model.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in model}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    mask[0, -5:] = 0
    with (
        stopping_after(decoder, layers - 1),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        decoder.base(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [8, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_frozen_layer_keeps(family: str, heads: int, dtype: str) -> None:
    """The third layer, whose attention is as the first one's."""
    config, kind = config_of(family, heads), getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=kind, attn_implementation=attention_implementation(config)
    )
    decoder = find_decoder(model.eval().requires_grad_(False))
    embedded = torch.randn(ROWS, LENGTH, 256, dtype=kind, requires_grad=True)
    kept = saved_bytes(decoder, embedded, 3) - saved_bytes(decoder, embedded, 2)
    reference = Model(path="m", dtype=dtype, config=config, weights="", tokens="", serving="")
    assert 0.95 < Batch(reference, ROWS, LENGTH).kept() / kept < 1.15


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("llama", 2 * 256),
        ("gemma2", 4 * 256),
        ("qwen3", 2 * 256 + 8 * 32 + 2 * 32),  # of every head
        ("gemma3", 4 * 256 + 8 * 32 + 2 * 32),
        ("olmo2", 2 * 256 + 8 * 32 + 2 * 32),  # of all heads at once
    ],
)
def test_widths_of_norms(family: str, norms: int) -> None:
    assert shape_of(config_of(family, 2)).norms == norms


def test_gate_and_up_in_one_matrix_are_as_wide_as_one() -> None:
    sizes = {name: size for name, size in WIDTHS.items() if name != "head_dim"}
    config = transformers.Phi3Config(
        **sizes, num_hidden_layers=1, vocab_size=64, num_key_value_heads=2, pad_token_id=0
    )
    assert shape_of(config).intermediate == 640
