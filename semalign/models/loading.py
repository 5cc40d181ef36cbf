"""Load models, configurations and tokenizers, from the model zoo, a folder or the hub."""

from __future__ import annotations

import re
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers  # lazy: a model's classes, which take seconds, come with its first use
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from semalign.errors import UserError, nearest

_ZOO = Path(__file__).resolve().parents[1] / "zoo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
_WRITTEN_ANEW = ("config.json", "generation_config", "model.safetensors", "pytorch_model")
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def model_folder(path: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model: `zoo/<name>` (shipped), a folder, or a hub id (downloaded).

    **Arguments**: without `weights`, only configuration and tokenizer are downloaded.

    **Raises** `UserError` if there is no such folder and the hub has no such model.
    """
    name = str(path)
    if name.startswith("zoo/"):
        if (_ZOO / name[4:] / "config.json").is_file():
            return _ZOO / name[4:]
        shipped = [f"zoo/{found.parent.name}" for found in _ZOO.glob("*/config.json")]
        raise UserError(f"model '{name}' is not shipped with semalign: {nearest(name, shipped)}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model folder '{name}' holds no config.json")
        return folder.resolve()
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"model folder '{name}' does not exist")
    return _download(name, weights)


@lru_cache
def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    skip = ["original/*", "consolidated*"]  # a second copy of the weights in another layout
    if not weights:
        skip.append("*.safetensors")
    try:
        found = snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=skip)
    except Exception as error:  # offline, unknown, gated, no disk: one message for all
        raise UserError(
            f"model '{hub_id}' is neither an existing folder nor available from the model hub "
            f"({type(error).__name__})"
        ) from error
    return Path(found)


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The Hugging Face configuration of the model at `path`.

    **Raises** `UserError` for a missing model or an unreadable config.json.
    """
    folder = model_folder(path, weights=False)
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder}/config.json cannot be used: {_first_line(error)}") from error


def attention_implementation(config: Any) -> str | None:
    """The fastest attention that computes what the configuration asks for: `eager` or transformers'
    own choice (None), which is `sdpa` where the architecture supports it.

    PyTorch's fused attention has no soft cap on logits (Gemma2, VaultGemma): with it transformers
    leaves the cap out without an error. Attention sinks (gpt-oss) need no rule of ours: their
    architectures refuse `sdpa`, and transformers then chooses `eager`.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped else None


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    num_layers: int | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal language model in evaluation mode, all parameters frozen.

    **Arguments**: `device` puts the whole model there; `device_map="auto"` spreads it over the
    devices instead. `num_layers` keeps the first layers (0..num_layers-1, 0-based); the weights
    of deeper ones are never read. `attn` is transformers' attention implementation
    (default: `attention_implementation` of the configuration).

    **Raises** `UserError` for a missing model, an unknown dtype, weights that are absent from the
    checkpoint (such as a missing LM head), or an architecture that is no causal language model.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype '{dtype}' is unknown: {nearest(dtype, _DTYPES)}")
    config = load_config(path, trust_remote_code=trust_remote_code)
    if num_layers is not None:
        _truncate(config.get_text_config(), num_layers, path)
    folder = model_folder(path)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the layers left out are reported as unexpected
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=_DTYPES[dtype],
            device_map=device_map,
            attn_implementation=attn or attention_implementation(config),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model '{path}' cannot be loaded: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    _check_complete(path, info)
    if device is not None and device_map is None:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def _check_complete(path: str | Path, info: dict[str, Any]) -> None:
    """Raise `UserError` where transformers would fill in random weights."""
    if absent := sorted(info["missing_keys"]):
        raise UserError(
            f"model '{path}' is no complete causal language model: its checkpoint lacks {absent[0]}"
            + (f" and {len(absent) - 1} more tensors" if len(absent) > 1 else "")
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"model '{path}' does not fit its config.json: {name} has shape {tuple(found)}, "
            f"expected {tuple(expected)}"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _truncate(config: Any, num_layers: int, path: str | Path) -> None:
    """Shorten the configuration, with every per-layer list in it, to its first `num_layers`."""
    total = config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise UserError(f"model '{path}' has {total} layers, {num_layers} were asked for")
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total and "layer" in key:
            setattr(config, key, value[:num_layers])
    config.num_hidden_layers = num_layers


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer at `path`, padding on the right, with EOS as padding token if it has none.

    **Raises** `UserError` if the folder holds no tokenizer.
    """
    folder = model_folder(path, weights=False)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"no tokenizer can be read from '{path}': {_first_line(error)}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def copy_companions(base: str | Path, out: str | Path) -> None:
    """Copy the files of a checkpoint other than weights and configuration: the tokenizer's."""
    for file in model_folder(base).iterdir():
        written = file.suffix in _WEIGHT_FILES or file.name.startswith(_WRITTEN_ANEW)
        if file.is_file() and not written:
            shutil.copyfile(file, Path(out) / file.name)
