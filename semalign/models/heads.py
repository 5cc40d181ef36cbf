"""Read an LM head's weight without loading the model: semantic bases need nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from semalign.errors import UserError
from semalign.models.loading import load_config, model_folder

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def read_lm_head(path: str, *, trust_remote_code: bool = False) -> Tensor:
    """The weight of the LM head (V, D), in the checkpoint's dtype; of tied ones the embedding's.

    Reads that one tensor from the safetensors files. **Raises** `UserError` if there is none.
    """
    file, name = find_lm_head(path, trust_remote_code=trust_remote_code)
    with safe_open(str(file), framework="pt") as handle:
        return handle.get_tensor(name)


def find_lm_head(path: str, *, trust_remote_code: bool = False) -> tuple[Path, str]:
    """The file and the tensor name of the LM head's weight; reads headers only.

    **Raises** `UserError` if the checkpoint has none.
    """
    config = load_config(path, trust_remote_code=trust_remote_code).get_text_config()
    folder = model_folder(path)
    files = _tensor_files(folder)
    endings = (HEAD, EMBEDDING) if getattr(config, "tie_word_embeddings", False) else (HEAD,)
    for ending in endings:
        for name, file in files.items():
            if name.endswith(ending):
                return folder / file, name
    raise UserError(
        f"{path}: no LM head in its weights (neither {HEAD} nor tied embeddings); "
        "expected a causal language model"
    )


def _tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file, from the index or the only file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(f"{folder}: no model.safetensors; expected weights in safetensors format")
    with safe_open(str(single), framework="pt") as handle:
        return dict.fromkeys(handle.keys(), single.name)
