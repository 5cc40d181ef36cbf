"""Read an LM head's weight without loading the model: semantic bases need nothing else."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from semalign.errors import UserError
from semalign.models.loading import load_config
from semalign.models.reading import reading
from semalign.models.weights import stored_tensors

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def read_lm_head(path: str, *, trust_remote_code: bool = False) -> Tensor:
    """The weight of the LM head (V, D), in the checkpoint's dtype; of tied ones the embedding's.

    Reads that one tensor from the safetensors files. **Raises** `UserError` if there is none.
    """
    file, name = find_lm_head(path, trust_remote_code=trust_remote_code)
    with reading(f"{file} is damaged or not complete"), safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def find_lm_head(path: str, *, trust_remote_code: bool = False) -> tuple[Path, str]:
    """The file and the tensor name of the LM head's weight; reads headers only.

    **Raises** `UserError` if the checkpoint has none.
    """
    config = load_config(path, trust_remote_code=trust_remote_code).get_text_config()
    stored = stored_tensors(path)
    endings = (HEAD, EMBEDDING) if getattr(config, "tie_word_embeddings", False) else (HEAD,)
    for ending in endings:
        for name, tensor in stored.items():
            if name.endswith(ending):
                return tensor.file, name
    raise UserError(
        f"{path}: no LM head in its weights (neither {HEAD} nor tied embeddings); "
        "expected a causal language model"
    )
