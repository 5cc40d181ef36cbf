"""Load models, configurations and tokenizers, from the model zoo, a folder or the hub."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers  # lazy: a model's classes, which take seconds, come with its first use
from torch import nn
from transformers.utils import logging as transformers_logging

from semalign.errors import UserError, nearest
from semalign.models.filenames import TEMPLATE_FILES, TOKENIZER_FILES
from semalign.models.reading import reading

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
_ZOO = Path(__file__).resolve().parents[1] / "zoo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.jinja",
    "*.py",
    *TOKENIZER_FILES,
    *TEMPLATE_FILES,
]
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
_WRITTEN_ANEW = ("config.json", "model.safetensors", "pytorch_model")
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
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(name):
            raise UserError(f"model folder '{name}' does not exist")
        folder = _download(name, weights)
    _check_kind(folder)
    return folder.resolve()


def _check_kind(folder: Path) -> None:
    """Raise UserError for a folder that holds no model, or a model and an adapter of it."""
    adapter = (folder / ADAPTER_CONFIG).is_file()
    if not (folder / "config.json").is_file():
        hint = ", but an adapter; expected its base model" if adapter else ""
        raise UserError(f"model folder '{folder}' holds no config.json{hint}")
    if adapter:
        raise UserError(
            f"model folder '{folder}' also holds {ADAPTER_CONFIG}: transformers would add that "
            "adapter to the weights, and vLLM would not; move the adapter's files to a folder of "
            "their own"
        )


def has_weights(path: str | Path) -> bool:
    """Whether the model's weights should be here by now: they are, or nobody downloads them."""
    folder = model_folder(path, weights=False)
    shipped = str(path).startswith("zoo/")
    return shipped or Path(path).expanduser().is_dir() or any(folder.glob("*.safetensors"))


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
    with reading(f"{folder}/config.json cannot be used"):
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def quantisation(config: Any) -> str | None:
    """The name of the quantisation that the checkpoint's weights are in; None for plain numbers."""
    for part in (config, config.get_text_config()):
        if found := getattr(part, "quantization_config", None):
            settings = found if isinstance(found, dict) else found.to_dict()
            return str(settings.get("quant_method", "an unnamed method"))
    return None


def check_plain(path: str | Path, config: Any) -> None:
    """Raise UserError for a quantised model: its layers can be served, but neither differentiated
    nor decomposed.
    """
    if (method := quantisation(config)) is not None:
        raise UserError(
            f"model '{path}' is quantised (quantization_config of its config.json: {method}); "
            "expected weights in float32, bfloat16 or float16: dequantise it first"
        )


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
    check_plain(path, config)
    if num_layers is not None:
        _truncate(config.get_text_config(), num_layers, path)
    folder = model_folder(path)
    with reading(f"model '{path}' cannot be loaded"), quietly():
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
    if num_layers is not None:
        info["unexpected_keys"] = ()  # the layers left out
    check_complete(path, info)
    if device is not None and device_map is None:
        model = model.to(device)
    return model.eval().requires_grad_(False)


@contextmanager
def quietly() -> Iterator[None]:
    """Within the context transformers logs errors alone and draws no bars."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def check_complete(path: str | Path, info: Mapping[str, Any]) -> None:
    """Raise UserError where transformers would fill in random weights or leave stored ones out.

    **Arguments**: `info` is transformers' loading info.
    """
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
    if left := sorted(info["unexpected_keys"]):
        raise UserError(
            f"model '{path}' does not fit its config.json: its weights hold {left[0]}"
            + (f" and {len(left) - 1} more tensors" if len(left) > 1 else "")
            + ", which that model has not"
        )


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
    """The tokenizer at `path`, padding on the right, with EOS as padding token if it has none; it
    ends no text in EOS, after which nothing would be left to answer.

    **Raises** `UserError` if the folder holds no tokenizer, or one that always adds EOS.
    """
    folder = model_folder(path, weights=False)
    with reading(f"no tokenizer can be read from '{path}'"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if _ends_in_eos(tokenizer):
        opens = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.add_bos_token, tokenizer.add_eos_token = opens, False
        if _ends_in_eos(tokenizer):
            raise UserError(f"the tokenizer of '{path}' ends every text in EOS; expected none")
    return tokenizer


def _ends_in_eos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[-1] == tokenizer.eos_token_id


def save_model(model: Any, folder: str | Path, base: str | Path) -> None:
    """Write a model as a checkpoint, with all other files as its base `base` has them.

    So a published generation_config.json that transformers would load and not save, such as one
    with a temperature and no do_sample, is kept byte for byte.
    """
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)
    (Path(folder) / "generation_config.json").unlink()
    _copy_companions(base, folder)


def _copy_companions(base: str | Path, out: str | Path) -> None:
    """Copy the files of a checkpoint other than weights and configuration."""
    source = model_folder(base)
    templates = {file for pattern in TEMPLATE_FILES for file in source.glob(pattern)}
    for file in templates | set(source.iterdir()):
        written = file.suffix in _WEIGHT_FILES or file.name.startswith(_WRITTEN_ANEW)
        if file.is_file() and not written:
            copied = Path(out) / file.relative_to(source)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copied)
