"""Tiny random-weight models of every supported family, built from their configurations."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn

_SHARED: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough that every sublayer matters
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEAD_DIM = {"head_dim": 12}  # not hidden_size / heads = 8
_ALTERNATING = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 3,
}

# family: (configuration class, what differs from the shared settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, **_HEAD_DIM}),
    "mistral": ("MistralConfig", {"sliding_window": 3, **_HEAD_DIM}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, **_ALTERNATING}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True, **_HEAD_DIM}),
    "gemma": ("GemmaConfig", _HEAD_DIM),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 12, **_ALTERNATING, **_HEAD_DIM}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 12, **_ALTERNATING, **_HEAD_DIM}),
    "vaultgemma": ("VaultGemmaConfig", {"query_pre_attn_scalar": 12, **_ALTERNATING, **_HEAD_DIM}),
    "olmo2": ("Olmo2Config", {}),
}


def make_config(family: str, **changes: Any) -> Any:
    name, differing = FAMILIES[family]
    return getattr(transformers, name)(**{**_SHARED, **differing, **changes})


def make_model(family: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A fresh model in evaluation mode, frozen; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(make_config(family, **changes))
    return model.eval().requires_grad_(False)


@cache
def shared_model(family: str) -> nn.Module:
    """One model per family for tests that leave it as they found it."""
    return make_model(family)


def right_padded_batch() -> tuple[Tensor, Tensor]:
    """Ids (3, 7) and attention mask: sequences of 7, 5 and 1 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 48, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] + [0] * 6])
    return ids * mask, mask


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def make_tokenizer(words: list[str], **changes: Any) -> Any:
    """A tokenizer that splits at spaces; `words` take the ids after <pad>, <s>, </s>, <unk>."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {token: id_ for id_, token in enumerate([*special.values(), *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **{**special, **changes})


def save_checkpoint(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A model folder with weights and tokenizer, as `load_model` expects it."""
    make_model(family, seed=seed, **changes).save_pretrained(folder)
    make_tokenizer([f"w{n}" for n in range(44)]).save_pretrained(folder)
    return folder
