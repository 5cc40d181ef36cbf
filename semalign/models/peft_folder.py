"""Read and check a saved LoRA in PEFT's layout without loading a model's weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from semalign.errors import UserError
from semalign.models.fingerprints import model_fingerprint
from semalign.models.loading import load_config
from semalign.models.shapes import skeleton

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """The adapter's configuration. **Raises** `UserError` if vLLM cannot serve the adapter."""
    for name in (_CONFIG, _WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise UserError(f"adapter {folder}: no {name}; expected a folder in PEFT's layout")
    config: dict[str, Any] = json.loads((Path(folder) / _CONFIG).read_text())
    if config.get("use_dora") or config.get("modules_to_save"):
        raise UserError(f"adapter {folder}: vLLM serves neither DoRA nor modules_to_save; merge it")
    return config


def adapter_fingerprint(folder: str | Path) -> str:
    """The SHA-256, in hex, of the weights and of the configuration without the base's path."""
    config = adapter_config(folder)
    config.pop("base_model_name_or_path", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update((Path(folder) / _WEIGHTS).read_bytes())
    return digest.hexdigest()


def adapter_rank(folder: str | Path) -> int:
    """The largest rank of the adapter's modules, for which an engine reserves memory."""
    config = adapter_config(folder)
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def check_adapter(
    folder: str | Path,
    model: str | Path,
    *,
    trust_remote_code: bool = False,
    cache: Path | None = None,
) -> None:
    """Check that the adapter belongs to this model; `cache` as for `model_fingerprint`.

    **Raises** `UserError` if the model lacks one of the adapter's modules or has it in another
    shape, or if the base that the adapter names is on this machine and has other weights.
    """
    config = adapter_config(folder)
    base = str(config.get("base_model_name_or_path"))
    shapes = _linear_shapes(model, trust_remote_code)
    with safe_open(Path(folder) / _WEIGHTS, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 -- not a mapping
            module = name.removeprefix("base_model.model.").partition(".lora_")[0]
            shape = shapes.get(module)
            if shape is None:
                raise UserError(f"adapter {folder}: {model} has no {module}; it is one of {base}")
            size = weights.get_slice(name).get_shape()
            fits = {_LORA_A: size[-1] == shape[1], _LORA_B: size[0] == shape[0]}
            if not fits.get(name[-len(_LORA_A) :], True):
                raise UserError(
                    f"adapter {folder}: its {module} is for another size than {model}'s, which is "
                    f"{shape[0]} x {shape[1]}; it is one of {base}"
                )
    local = base.startswith("zoo/") or (Path(base) / "config.json").is_file()
    if local and model_fingerprint(base, cache=cache) != model_fingerprint(model, cache=cache):
        raise UserError(f"adapter {folder}: made for {base}, whose weights {model} has not")


def _linear_shapes(path: str | Path, trust_remote_code: bool) -> dict[str, tuple[int, int]]:
    """(out, in) of every matrix of the model, by module name."""
    config = load_config(path, trust_remote_code=trust_remote_code)
    model = skeleton(config, trust_remote_code=trust_remote_code)
    return {
        name.removesuffix(".weight"): (parameter.shape[0], parameter.shape[1])
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
    }
