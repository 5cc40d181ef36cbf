"""Train layer k alone, by LoRA or in full; save what was trained, load it, merge it.

Layer numbers are 0-based. A LoRA is saved in the standard PEFT layout (plain peft and vLLM load
it); a fully trained layer as its weights and a JSON file that names its base model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from semalign.core.pairing import paper_number
from semalign.errors import UserError, nearest
from semalign.models.decoder import find_decoder
from semalign.models.loading import ADAPTER_CONFIG, load_model, save_model
from semalign.models.reading import reading

if TYPE_CHECKING:  # takes a second, and is not needed by who reads what an artifact is
    from peft import PeftModel

LORA_TARGETS = ("up_proj", "down_proj", "v_proj", "o_proj")  # appendix A.2
_LAYER_WEIGHTS = "layer_weights.safetensors"
_LAYER_CONFIG = "layer_weights.json"


def lora_on_layers(
    model: nn.Module,
    layers: list[int],
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: tuple[str, ...] | list[str] = LORA_TARGETS,
    seed: int = 0,
) -> PeftModel:
    """The model, frozen, with a trainable LoRA on the linear modules of these layers alone.

    **Arguments**: `alpha` defaults to 2 rank. The same seed gives the same initial adapter, and
    leaves torch's own random state alone.

    **Raises** `UserError` if a layer is out of range or has no such linear module.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=_linear_paths(model, layers, target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # PEFT initialises on the CPU
        return get_peft_model(model, config)


def _linear_paths(model: nn.Module, layers: Iterable[int], names: Iterable[str]) -> list[str]:
    """The paths in the model of the decoder layers' linear modules of these names.

    Whole paths, for other parts of a model, such as a vision tower, have modules of these names.
    """
    decoder = find_decoder(model)
    paths = {module: path for path, module in model.named_modules()}
    found = set()
    for layer in layers:
        _check_layer(layer, len(decoder.layers))
        linear: dict[str, list[str]] = {}
        for name, module in decoder.layers[layer].named_modules():
            if isinstance(module, nn.Linear):
                linear.setdefault(name.split(".")[-1], []).append(paths[module])
        for name in names:
            if name not in linear:
                raise UserError(
                    f"training.lora.target_modules: student layer {paper_number(layer)} (counted "
                    f"from 1) has no linear module '{name}'; {nearest(name, linear)}"
                )
            found |= set(linear[name])
    return sorted(found)


def full_layers(model: nn.Module, layers: list[int]) -> nn.Module:
    """The same model, frozen except for all parameters of these layers."""
    decoder = find_decoder(model)
    model.requires_grad_(False)
    for layer in layers:
        _check_layer(layer, len(decoder.layers))
        decoder.layers[layer].requires_grad_(True)
    return model


def _check_layer(layer: int, num_layers: int) -> None:
    if not 0 <= layer < num_layers:
        number = paper_number(layer)
        raise UserError(
            f"student layer {number} is out of range: the student has layers 1..{num_layers}"
        )


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters by name, on the CPU, for a checkpoint."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a `trainable_state` back in place.

    **Raises** `UserError` if the names or shapes are not those of the model's trainable parameters.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if differing := sorted(trainable.keys() ^ state.keys()):
        raise UserError(f"the checkpoint was made with other trainable parameters: {differing[0]}")
    for name, parameter in trainable.items():
        if parameter.shape != state[name].shape:
            raise UserError(
                f"the checkpoint's {name} has shape {tuple(state[name].shape)}, "
                f"the model's {tuple(parameter.shape)}"
            )
        parameter.copy_(state[name])


def save_adapter(model: nn.Module, path: str | Path, base_path: str | Path) -> None:
    """Save the trained weights into the folder `path`, with `base_path` as their base model.

    LoRA: adapter_config.json and adapter_model.safetensors. Full layers: layer_weights.safetensors
    and layer_weights.json. The bytes depend only on the weights and the settings.
    """
    from peft import PeftModel

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if not isinstance(model, PeftModel):
        save_file(trainable_state(model), path / _LAYER_WEIGHTS, metadata={"format": "pt"})
        config = {"base_model_name_or_path": str(base_path)}
        (path / _LAYER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return
    model.peft_config["default"].base_model_name_or_path = str(base_path)
    model.save_pretrained(str(path), save_embedding_layers=False)
    (path / "README.md").unlink()  # PEFT's model card, an empty form
    config_file = path / ADAPTER_CONFIG
    config = json.loads(config_file.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set: any order
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """The base model with a saved adapter, frozen.

    **Raises** `UserError` if the folder holds no adapter, or one of another model's shapes.
    """
    from peft import PeftModel

    path = Path(path)
    if (path / ADAPTER_CONFIG).is_file():
        with reading(f"adapter '{path}' does not fit the model"):
            return PeftModel.from_pretrained(model, str(path))
    if not (path / _LAYER_WEIGHTS).is_file():
        raise UserError(f"'{path}' holds no adapter: neither {ADAPTER_CONFIG} nor {_LAYER_CONFIG}")
    with reading(f"{path / _LAYER_WEIGHTS} is damaged"):
        weights = load_file(path / _LAYER_WEIGHTS)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if name not in parameters or parameters[name].shape != weight.shape:
                raise UserError(f"adapter '{path}' does not fit the model: {name}")
            parameters[name].copy_(weight)
    return model


def merge_adapter(
    base_path: str | Path,
    adapter_path: str | Path,
    out_path: str | Path,
    *,
    dtype: str = "float32",
) -> None:
    """Write base + adapter as an ordinary Hugging Face checkpoint, tokenizer included.

    float32 by default: merged in bfloat16 the weights are rounded once more, and the outputs of the
    merged model differ from those of base and adapter.
    """
    from peft import PeftModel

    adapted: Any = load_adapter(load_model(base_path, dtype=dtype), adapter_path)
    if isinstance(adapted, PeftModel):
        adapted = adapted.merge_and_unload()
    save_model(adapted, out_path, base_path)
