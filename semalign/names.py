"""Names that users give (of subjects, models, tasks, sweeps) as names of other systems.

A name that fits is left as it is. In another the characters that do not fit become `_`, it is cut
to its limit, and a hash of the original follows, so that names that differ still do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path

_PART_BYTES = 60  # four of them and what is between make a key of MLflow, of 250 characters
_FILE_BYTES = 100  # file systems take 255; a key, and what marks an unfinished folder, follow


def record_name(name: str, *, taken: Collection[str] = ()) -> str:
    """One part of a metric's, parameter's or tag's key in MLflow; none of those that are `taken`.

    MLflow takes letters, digits and `_ - . : space`; a slash separates parts.
    """
    return _fitting(name, r"[^\w\-. :]", _PART_BYTES, taken)


def file_name(name: str) -> str:
    """A name of a file or folder, without what shells, globs and URIs give a meaning."""
    return _fitting(name, r"[^\w\-. +=,@()]", _FILE_BYTES, ())


def sqlite_uri(file: Path) -> str:
    """The URI of an SQLite database, in which `%` and `?` would have a meaning."""
    return "sqlite:///" + str(file).replace("%", "%25").replace("?", "%3F")


def _fitting(name: str, wrong: str, limit: int, taken: Collection[str]) -> str:
    fits = re.sub(wrong, "_", name).strip(" .-")
    if fits == name and name and name not in taken and len(name.encode()) <= limit:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    cut = fits.encode()[: limit - len(digest) - 1].decode(errors="ignore")
    return f"{cut}-{digest}" if cut else digest
