"""The names and shapes of a model's parameters, from its configuration alone."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn


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
