"""The tensors of a checkpoint, from the headers of its safetensors files: no weight is read."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from semalign.errors import UserError
from semalign.models.loading import (
    check_complete,
    load_config,
    model_folder,
    quantisation,
    quietly,
)
from semalign.models.reading import reading
from semalign.models.shapes import skeleton

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_POINTER = b"version https://git-lfs"
_COMPARED_ROWS = 64  # of an LM head and an embedding that should be one


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and its shape."""

    file: Path
    shape: tuple[int, ...]


def stored_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint by name, from the index's files or the only file.

    **Raises** `UserError` for files that are missing, cut off, git-lfs pointers, or of which it is
    not clear which ones are the weights.
    """
    folder = model_folder(path)
    index, single = folder / _INDEX, folder / _SINGLE
    if index.is_file() and single.is_file():
        raise UserError(
            f"model folder '{folder}' holds both {_SINGLE} and {_INDEX}, which are two sets of "
            "weights; expected one of them"
        )
    if single.is_file():
        return _headers(single)
    if not index.is_file():
        raise UserError(f"{folder}: no {_SINGLE}; expected weights in safetensors format")
    with reading(f"{index} cannot be read"):
        listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    files = sorted(set(listed.values()))
    if absent := [name for name in files if not (folder / name).is_file()]:
        raise UserError(
            f"{index}: {len(absent)} of its {len(files)} files are not there, such as {absent[0]}"
        )
    found = {name: tensor for file in files for name, tensor in _headers(folder / file).items()}
    for name, file in listed.items():
        if name not in found:
            raise UserError(f"{index}: {name} is not in {file}")
    return found


def _headers(file: Path) -> dict[str, StoredTensor]:
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{file} is a git-lfs pointer and holds no weights; fetch them with `git lfs pull`"
            )
    with reading(f"{file} is damaged or not complete"), safe_open(file, framework="pt") as tensors:
        return {
            name: StoredTensor(file, tuple(tensors.get_slice(name).get_shape()))
            for name in tensors.keys()  # noqa: SIM118 -- not a mapping
        }


def check_weights(path: str | Path, *, trust_remote_code: bool = False) -> None:
    """Check that the files hold every tensor of the configuration's model in its shape, and no
    other: transformers would fill in random ones and leave others out, and so would an engine.

    Goes by the headers, and by transformers' own rules for names. Quantised checkpoints have other
    tensors and are not compared.

    **Raises** `UserError` as `stored_tensors` does, and for the first tensor that does not fit.
    """
    folder = model_folder(path)
    files = sorted(folder.glob("*.safetensors*"))
    _check(folder, tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in files),
           trust_remote_code)  # fmt: skip


@lru_cache(maxsize=64)
def _check(folder: Path, _state: Any, trust_remote_code: bool) -> None:
    config = load_config(folder, trust_remote_code=trust_remote_code)
    stored = stored_tensors(folder)
    if quantisation(config) is not None:
        return
    with reading(f"model '{folder}' cannot be loaded"), quietly():
        whole = skeleton(config, trust_remote_code=trust_remote_code)
        dtype = next(whole.parameters()).dtype
        empty = {
            name: torch.empty(tensor.shape, dtype=dtype, device="meta")
            for name, tensor in stored.items()
        }
        _, info = type(whole).from_pretrained(  # type: ignore[attr-defined]
            None,
            config=copy.deepcopy(config),
            state_dict=empty,
            dtype=dtype,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_complete(folder, info)
    if config.get_text_config().tie_word_embeddings:
        _check_tied(folder, stored)


def _check_tied(folder: Path, stored: dict[str, StoredTensor]) -> None:
    """Raise UserError for an LM head of its own where the configuration has none."""
    pair = [
        (name, tensor)
        for end in ("lm_head.weight", "embed_tokens.weight")
        for name, tensor in stored.items()
        if name.endswith(end)
    ]
    if len(pair) != 2 or pair[0][1].shape != pair[1][1].shape:
        return
    rows = []
    for name, tensor in pair:
        with safe_open(tensor.file, framework="pt") as tensors:
            step = max(1, tensor.shape[0] // _COMPARED_ROWS)
            part = tensors.get_slice(name)
            rows.append([part[row : row + 1] for row in range(0, tensor.shape[0], step)])
    if any(not torch.equal(ours, theirs) for ours, theirs in zip(*rows, strict=True)):
        raise UserError(
            f"model '{folder}': its weights have an LM head ({pair[0][0]}) that differs from the "
            "embedding, and its config.json ties the two: transformers would keep both and an "
            "engine only the embedding; set tie_word_embeddings to false or remove the head"
        )
