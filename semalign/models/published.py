"""The shapes of the paper's models (Table 3), for plans where the models are not available.

Head and layer numbers, widths and vocabularies are the table's; MLP widths and rotary bases those
of the models' published configurations.
"""

from __future__ import annotations

from typing import Any

import transformers

from semalign.errors import UserError
from semalign.models.loading import load_tokenizer, model_folder
from semalign.models.vocabulary import Overlap, shared_rows

_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32_000,
}
_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32_000,
}
_CODE = {"rope_theta": 1e6, "max_position_embeddings": 16_384}
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-chat-hf": _7B,
    "meta-llama/Llama-2-13b-chat-hf": _13B,
    "codellama/CodeLlama-13b-Python-hf": _13B | _CODE,
    "WizardLMTeam/WizardCoder-Python-13B-V1.0": _13B | _CODE | {"vocab_size": 32_001},
}
STAND_IN = "zoo/student"  # whose tokenizer counts the tokens


def absent(path: str) -> bool:
    """Whether this is one of the paper's models and is not available here. Reads no weights."""
    if path not in SHAPES:
        return False
    try:
        model_folder(path, weights=False)
    except UserError:
        return True
    return False


def stand_in(teacher: Any, student: Any) -> tuple[Any, Overlap]:
    """A tokenizer that counts tokens, and the overlap of two vocabularies with the same ids."""
    return load_tokenizer(STAND_IN), shared_rows(student.vocab_size, teacher.vocab_size)


def published_config(path: str) -> transformers.LlamaConfig:
    """The configuration of one of the paper's models. **Raises** `KeyError` for any other."""
    return transformers.LlamaConfig(**SHAPES[path])
