"""An LM head's weight by itself: the semantic bases need nothing else of a model."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from semalign.errors import UserError
from semalign.models.loading import load_config, resolve

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def read_lm_head(path: str, *, trust_remote_code: bool = False) -> Tensor:
    """(V, D), in the checkpoint's dtype; the input embedding where the two are tied.

    Reads that one tensor from the safetensors files. Raises UserError when there is none.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    folder = Path(resolve(path))
    names = _tensor_files(folder)
    wanted = HEAD
    if not any(name.endswith(HEAD) for name in names):
        wanted = EMBEDDING if getattr(config, "tie_word_embeddings", False) else ""
    for name, file in names.items():
        if wanted and name.endswith(wanted):
            with safe_open(str(folder / file), framework="pt") as handle:
                return handle.get_tensor(name)
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
