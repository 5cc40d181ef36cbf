"""Content hashes of models, tokenizers and files.

Each returns a SHA-256 in hex. `cache` is a folder that keeps the digests of files between
processes: a file is read again only when its size, modification time or inode has changed. Within a
process digests are kept in memory by the same rule.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from semalign.errors import UserError
from semalign.files import write_json
from semalign.models.filenames import TEMPLATE_FILES, TOKENIZER_FILES
from semalign.models.loading import model_folder

_State = tuple[int, int, int]  # size in bytes, modification time in ns, inode

_VOLATILE_KEYS = {"transformers_version", "_name_or_path", "name_or_path"}


def model_fingerprint(path: str | Path, *, cache: Path | None = None) -> str:
    """The SHA-256 of a model's configuration (without volatile keys), code and weight files.

    Reading takes about a minute for 26 GB. **Raises** `UserError` if the folder has no weights.
    """
    folder = model_folder(path)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"model folder '{folder}' holds no *.safetensors weights")
    code = sorted(set(folder.glob("*.py")) - set(folder.glob("tokenization_*.py")))
    return _fingerprint(folder, [folder / "config.json", *code, *weights], cache)


def cached_fingerprint(path: str | Path, *, cache: Path | None) -> str | None:
    """`model_fingerprint` where the digests of all weights are in the cache; else None. Reads no
    weights, and nothing is written.
    """
    folder = model_folder(path, weights=False)
    weights = sorted(folder.glob("*.safetensors"))
    if cache is None or not weights or not all(_is_cached(file, cache) for file in weights):
        return None
    return model_fingerprint(folder, cache=cache)


def tokenizer_fingerprint(path: str | Path, *, cache: Path | None = None) -> str:
    """The SHA-256 of the files that decide token ids: equal fingerprints give equal token ids.

    The chat template is no part of it. **Raises** `UserError` if the folder has no tokenizer.
    """
    folder = model_folder(path)
    files = _matching(folder, TOKENIZER_FILES)
    if not files:
        raise UserError(f"folder '{folder}' holds no tokenizer files")
    return _fingerprint(folder, files, cache)


def serving_fingerprint(path: str | Path, *, cache: Path | None = None) -> str:
    """The SHA-256 of the chat templates and stop ids, which with the weights, the configuration and
    the tokenizer decide what an engine generates.

    Templates are those of tokenizer_config.json and of files of their own; stop ids are
    `eos_token_id` of generation_config.json.
    """
    folder = model_folder(path, weights=False)
    stop_ids = _read_json(folder / "generation_config.json").get("eos_token_id")
    content = {
        "chat_template": _read_json(folder / "tokenizer_config.json").get("chat_template"),
        "files": _fingerprint(folder, _matching(folder, TEMPLATE_FILES), cache),
        "stop_ids": sorted(stop_ids) if isinstance(stop_ids, list) else [stop_ids],
    }
    return _json_digest(content)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def _fingerprint(folder: Path, files: list[Path], cache: Path | None) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)}:{_content_digest(file, cache)}\n".encode())
    return digest.hexdigest()


def _content_digest(file: Path, cache: Path | None) -> str:
    """The digest of one file; of configurations in canonical form, without what has no effect."""
    if file.name == "config.json":
        ignored = _VOLATILE_KEYS
    elif file.name == "tokenizer_config.json":
        ignored = _VOLATILE_KEYS | {"chat_template"}
    else:
        return file_digest(file, cache=cache)
    return _json_digest({k: v for k, v in _read_json(file).items() if k not in ignored})


def _json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def file_digest(file: str | Path, *, cache: Path | None = None) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    file = Path(file).resolve()
    found = file.stat()
    return _file_digest(file, (found.st_size, found.st_mtime_ns, found.st_ino), cache)


def _is_cached(file: Path, cache: Path) -> bool:
    file = file.resolve()
    found = file.stat()
    entry, key = _entry(file, (found.st_size, found.st_mtime_ns, found.st_ino), cache)
    return _cached_digest(entry, key) is not None


def _entry(file: Path, state: _State, cache: Path) -> tuple[Path, dict[str, Any]]:
    """The file of the cache that keeps a digest, and what names the state of its file."""
    entry = cache / f"{hashlib.sha256(str(file).encode()).hexdigest()[:32]}.json"
    key = {"path": str(file), **dict(zip(("size", "mtime_ns", "inode"), state, strict=True))}
    return entry, key


@lru_cache(maxsize=4096)
def _file_digest(file: Path, state: _State, cache: Path | None) -> str:
    if cache is None:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    entry, key = _entry(file, state, cache)
    digest = _cached_digest(entry, key)
    if digest is None:
        digest = _file_digest(file, state, None)
        with suppress(UserError, OSError):  # a cache that cannot be written only costs time
            write_json(entry, {**key, "sha256": digest})
    return digest


def _cached_digest(entry: Path, key: dict[str, Any]) -> str | None:
    """The digest in a cache entry; None where it is missing, damaged or of another file state."""
    try:
        found = json.loads(entry.read_text(encoding="utf-8"))
        digest = found.pop("sha256")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    whole = isinstance(digest, str) and len(digest) == hashlib.sha256().digest_size * 2
    return digest if whole and found == key else None
