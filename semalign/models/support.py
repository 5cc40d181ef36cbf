"""Whether a model is one that the methods understand, from its configuration: no weight is read."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn

from semalign.errors import UserError
from semalign.models.adapters import lora_on_layers
from semalign.models.decoder import find_decoder, verify_structure
from semalign.models.loading import check_plain, load_config
from semalign.models.reading import reading
from semalign.models.reference import Model
from semalign.models.shapes import skeleton

_NARROW = {"intermediate_size": 32, "moe_intermediate_size": 32, "vocab_size": 64}
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def check_supported(model: Model) -> None:
    """Check that the model can be decomposed and trained: its weights are not quantised, and it is
    a stack of layers whose sublayers are added to the residual stream, with an LM head that gives
    the logits (`verify_structure`, on a narrow model with random weights).

    **Raises** `UserError` for other models.
    """
    if not model.absent:
        whole = load_config(model.path, trust_remote_code=model.trust_remote_code)
        check_plain(model.path, whole)
    try:
        with reading("it cannot be made"):
            find_decoder(skeleton(model.config, trust_remote_code=model.trust_remote_code))
            if (narrow := narrow_model(model)) is not None:
                verify_structure(find_decoder(narrow))
    except UserError as error:
        raise UserError(f"model '{model.path}' is not supported: {error}") from error


@lru_cache(maxsize=256)
def check_lora(model: Model, layers: tuple[int, ...], target_modules: tuple[str, ...]) -> None:
    """Check that PEFT can adapt these linear modules of these layers (0-based) of the model.

    **Raises** `UserError` for modules that the layers have not or that PEFT cannot adapt.
    """
    found = narrow_model(model)
    if found is None:
        found = skeleton(model.config, trust_remote_code=model.trust_remote_code)
    with reading(f"training.lora.target_modules: {model.path} cannot be adapted"):
        lora_on_layers(copy.deepcopy(found), list(layers), rank=1, target_modules=target_modules)


def narrow_model(model: Model) -> nn.Module | None:
    """A model with the same layers, two heads wide and with random float32 weights; None where the
    architecture cannot be made narrow so.

    Equal configurations share one model, which must not be changed.
    """
    kind: Any = type(model.config)
    content = model.config.to_json_string(use_diff=False)
    return _narrow_model(kind, content, model.trust_remote_code)


@lru_cache(maxsize=8)
def _narrow_model(kind: Any, content: str, trust_remote_code: bool) -> nn.Module | None:
    whole = json.loads(content)
    heads = whole["num_attention_heads"]
    grouped = (whole.get("num_key_value_heads") or heads) != heads
    changes = {
        **{name: size for name, size in _NARROW.items() if name in whole},
        **dict.fromkeys(_SPECIAL, None),
        "hidden_size": 2 * (whole["hidden_size"] // heads),
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if grouped else 2,
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                kind.from_dict(whole | changes),
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
            )
            model.eval().requires_grad_(False)
            model(input_ids=torch.tensor([[0, 1]]), use_cache=False)
    except Exception:  # the whole model can be made: it is the narrow one that is not consistent
        return None
    return model
