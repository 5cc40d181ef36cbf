"""Read and check a saved LoRA in PEFT's layout without loading a model's weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semalign.errors import UserError, one_line
from semalign.models.fingerprints import model_fingerprint
from semalign.models.loading import ADAPTER_CONFIG, load_config
from semalign.models.reading import reading
from semalign.models.shapes import skeleton
from semalign.models.weights import headers

LARGEST_RANK = 512  # of a LoRA that vLLM serves
_WEIGHTS = "adapter_model.safetensors"
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"

# What of PEFT's LoraConfig vLLM applies, and what has no effect once the adapter is trained. All
# else that is set would be left out without an error, or refused by the engine.
_APPLIED = {"r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern"}
_OF_TRAINING = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern"),
    *("exclude_modules", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config"),
    "ensure_weight_tying",
}
_PLAIN = {  # the only values of the others under which an adapter is a plain LoRA
    "peft_type": ("LORA",),
    "bias": ("none",),
    # vLLM's list: others, such as PiSSA, change the weights of the base when PEFT loads the adapter
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
}


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """The adapter's configuration.

    **Raises** `UserError` for one that cannot be read, or that vLLM would not serve as it is.
    """
    for name in (ADAPTER_CONFIG, _WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise UserError(f"adapter {folder}: no {name}; expected a folder in PEFT's layout")
    with reading(f"{folder}/{ADAPTER_CONFIG} is damaged"):
        config = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UserError(f"{folder}/{ADAPTER_CONFIG}: expected the settings of an adapter by name")
    _check_served(folder, config)
    return config


def _check_served(folder: str | Path, config: Mapping[str, Any]) -> None:
    for name in (*_PLAIN, *config):
        value = config.get(name)
        if value and name not in _APPLIED | _OF_TRAINING and value not in _PLAIN.get(name, ()):
            plain = ", ".join(map(str, _PLAIN.get(name, ("none",))))
            raise UserError(
                f"adapter {folder}: vLLM does not serve {name}={one_line(value, limit=60)}; "
                f"expected {plain}, or the adapter merged into its base"
            )
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise UserError(f"{folder}/{ADAPTER_CONFIG}: expected ranks r of at least 1, found {ranks}")
    for name in ("lora_alpha", "target_modules"):
        if not config.get(name):
            raise UserError(f"{folder}/{ADAPTER_CONFIG}: expected {name}, as PEFT writes it")


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
    for module, (rank, inputs, outputs) in _factors(folder).items():
        shape = shapes.get(module)
        if shape is None:
            raise UserError(f"adapter {folder}: {model} has no {module}; it is one of {base}")
        if (outputs, inputs) != shape:
            raise UserError(
                f"adapter {folder}: its {module} is for another size than {model}'s, which is "
                f"{shape[0]} x {shape[1]}; it is one of {base}"
            )
        if not config.get("rank_pattern") and rank != config["r"]:
            raise UserError(
                f"adapter {folder}: its {module} has rank {rank}, and its {ADAPTER_CONFIG} "
                f"r={config['r']}"
            )
    local = base.startswith("zoo/") or (Path(base) / "config.json").is_file()
    if local and model_fingerprint(base, cache=cache) != model_fingerprint(model, cache=cache):
        raise UserError(f"adapter {folder}: made for {base}, whose weights {model} has not")


def _factors(folder: str | Path) -> dict[str, tuple[int, int, int]]:
    """(rank, in, out) of every module's two factors, by the module's name in the base.

    **Raises** `UserError` for a file that is damaged, holds none, or holds something else.
    """
    file = Path(folder) / _WEIGHTS
    sizes = {name: tensor.shape for name, tensor in headers(file).items()}
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in sizes.items():
        module, factor = name.removeprefix("base_model.model."), name[-len(_LORA_A) :]
        if factor not in (_LORA_A, _LORA_B):
            raise UserError(f"{file}: {name} is no factor of a LoRA on a linear module")
        pairs.setdefault(module.removesuffix(factor), {})[factor] = size
    if not pairs:
        raise UserError(f"{file}: holds no tensors")
    found = {}
    for module, pair in pairs.items():
        if len(pair) < 2 or any(len(size) != 2 for size in pair.values()):
            raise UserError(f"{file}: {module} has no two factors; found {pair}")
        (rank, inputs), (outputs, rank_out) = pair[_LORA_A], pair[_LORA_B]
        if rank != rank_out:
            raise UserError(f"{file}: the factors of {module} have ranks {rank} and {rank_out}")
        found[module] = rank, inputs, outputs
    return found


def _linear_shapes(path: str | Path, trust_remote_code: bool) -> dict[str, tuple[int, int]]:
    """(out, in) of every matrix of the model, by module name."""
    config = load_config(path, trust_remote_code=trust_remote_code)
    model = skeleton(config, trust_remote_code=trust_remote_code)
    return {
        name.removesuffix(".weight"): (parameter.shape[0], parameter.shape[1])
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
    }
