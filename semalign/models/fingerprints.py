"""Content hashes of models and tokenizers."""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from semalign.errors import UserError
from semalign.models.loading import resolve

_VOLATILE_KEYS = {"transformers_version", "_name_or_path", "name_or_path"}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def model_fingerprint(path: str | Path) -> str:
    """SHA-256 of the configuration (without volatile keys) and of all weight files, as hex.

    Reads every byte once per process and file version: about a minute for 26 GB.
    """
    folder = resolve(path)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"model folder '{folder}' holds no *.safetensors weights")
    return _fingerprint(folder, ("config.json", *(file.name for file in weights)))


def tokenizer_fingerprint(path: str | Path) -> str:
    """SHA-256 of the tokenizer's files, as hex: equal fingerprints give equal token ids."""
    folder = resolve(path)
    names = tuple(name for name in _TOKENIZER_FILES if (folder / name).is_file())
    if not names:
        raise UserError(f"folder '{folder}' holds no tokenizer files")
    return _fingerprint(folder, names)


def _fingerprint(folder: Path, names: tuple[str, ...]) -> str:
    digest = sha256()
    for name in names:
        stat = (folder / name).stat()
        content = _file_digest(folder / name, stat.st_size, stat.st_mtime_ns)
        digest.update(f"{name}:{content}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _file_digest(file: Path, _size: int, _mtime_ns: int) -> str:
    """Digest of one file; JSON configurations canonically and without their volatile keys."""
    digest = sha256()
    if file.name in ("config.json", "tokenizer_config.json"):
        content = json.loads(file.read_text())
        stable = {key: value for key, value in content.items() if key not in _VOLATILE_KEYS}
        digest.update(json.dumps(stable, sort_keys=True).encode())
        return digest.hexdigest()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
