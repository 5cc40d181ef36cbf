"""The names and shapes of a model's parameters, from its configuration alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn

from semalign.models.decoder import find_decoder

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of one number


def skeleton(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a Hugging Face configuration on the meta device: no weights.

    Equal configurations share one model, which must not be changed: making a large one takes a
    second.
    """
    kind: Any = type(config)
    return _skeleton(kind, config.to_json_string(use_diff=False), trust_remote_code)


@lru_cache(maxsize=8)
def _skeleton(kind: Any, content: str, trust_remote_code: bool) -> nn.Module:
    config = kind.from_dict(json.loads(content))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )


@dataclass(frozen=True)
class Shape:
    """Numbers of weights: of one layer, of the embedding (0 when tied) and of the LM head.

    `attention` is the width of all heads together, `intermediate` that of the MLP, `norms` that of
    all norms of a layer together.
    """

    layers: int
    width: int
    vocabulary: int
    attention: int
    intermediate: int
    norms: int
    per_layer: int
    embedding: int
    head: int

    @property
    def weights(self) -> int:
        """All of them, without the last norm."""
        return self.layers * self.per_layer + self.embedding + self.head

    @staticmethod
    def bytes(dtype: str) -> int:
        """Of one weight."""
        return BYTES[dtype]


def shape_of(config: Any) -> Shape:
    """Counted on a model without storage, so any architecture and size takes under a second."""
    decoder = find_decoder(skeleton(config))
    head, layer = decoder.lm_head.weight, decoder.layers[0]
    linear = [module for module in layer.mlp.modules() if isinstance(module, nn.Linear)]
    return Shape(
        layers=len(decoder.layers),
        width=head.shape[1],
        vocabulary=head.shape[0],
        attention=layer.self_attn.o_proj.weight.shape[1],
        # an input: gate and up are one matrix in some families
        intermediate=max((m.in_features for m in linear), default=head.shape[1]),
        norms=_norm_widths(layer, head.shape[1]),
        per_layer=sum(p.numel() for p in layer.parameters()),
        embedding=0 if config.tie_word_embeddings else head.numel(),
        head=head.numel(),
    )


def _norm_widths(layer: nn.Module, width: int) -> int:
    """Numbers of a token that a layer's norms take: one of queries or keys, those of all heads."""
    widths = 0
    for name, module in layer.named_modules():
        if type(module).__name__.endswith("Norm"):
            source = name.rpartition(".")[2].replace("_norm", "_proj")
            projection = getattr(layer.self_attn, source, None)
            widths += projection.out_features if isinstance(projection, nn.Linear) else width
    return widths
