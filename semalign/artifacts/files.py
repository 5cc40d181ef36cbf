"""Files that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

from semalign.errors import UserError


def sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_key(*parts: Any) -> str:
    """A short name for whatever determines a result; equal parts give equal names."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(file: Path, value: Any) -> None:
    """As `write_text`, sorted by key."""
    write_text(file, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(file)
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror}); choose another workdir"
        ) from None


def _beside(file: Path) -> Path:
    """A name that no other writer has, on whichever machine."""
    return file.with_name(f".{file.name}.{uuid.uuid4().hex}")


def _read_json(file: Path) -> Any:
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); delete the folder to make it again") from None
