"""Files and folders that are whole or not there, locks, and names by content.

The only place that writes under another name and renames, and the only one that locks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from semalign.errors import Failed, UserError, root_cause

_PATIENCE_S = 2.0  # a lock that is free sooner is not worth a line
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# How libraries that lose the errno report it: safetensors, SQLite, torch.save.
_NO_SPACE_TEXTS = (
    *map(os.strerror, _NO_SPACE),
    "database or disk is full",
    "inline_container.cc",
)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_key(*parts: Any) -> str:
    """A short name for JSON values: equal values, and only those, give equal names.

    **Raises** `TypeError` or `ValueError` for anything that JSON does not hold exactly, such as an
    object or NaN: its text might be equal for different content.
    """
    text = json.dumps(parts, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A path to write a file to; renamed to `target` when the context ends without an error.

    A reader of `target` never sees half a file. **Raises** `UserError` where nothing can be
    written, and `OSError` when the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(target)
        try:
            yield partial
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if disk_full(error):
            raise
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); choose another workdir"
        ) from None


@contextmanager
def making(target: Path) -> Iterator[Path]:
    """An empty folder to fill; renamed to `target`, replacing what is there, when the context ends
    without an error, and removed otherwise.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file that is whole or not there."""
    with writing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    """As `write_text`, sorted by key."""
    write_text(file, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(file: Path) -> Any:
    """The value in a JSON file; None where there is no such file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); delete the folder to make it again") from None


@contextmanager
def locked(file: Path, purpose: str) -> Iterator[None]:
    """Within the context no other process holds `file`'s lock.

    A wait of more than two seconds is reported once, with its `purpose`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=_PATIENCE_S)
    except Timeout:
        print(f"waiting for another process: {purpose} ({file})", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_writable(folder: Path) -> None:
    """Make the work folder. Raises UserError when it cannot be written."""
    probe = folder / f".writable-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"workdir={folder}: cannot be written ({error.strerror}); choose a folder you own"
        ) from None


def disk_full(error: BaseException | None) -> bool:
    """Whether the error, or what it was raised from, is that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        if any(text in str(error) for text in _NO_SPACE_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_bytes(folder: Path) -> int:
    """Bytes that can be written to the file system of the folder, which may not be there yet."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def check_room(needed: int, folder: Path) -> None:
    """Raise UserError when the folder's disk has less room than so many bytes."""
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{folder}: {bytes_text(needed)} are to be written there and {bytes_text(free)} are "
            f"free, so {bytes_text(needed - free)} are missing; make room, or choose a folder on "
            "another disk"
        )


@contextmanager
def naming_full_disk(workdir: Path, to_write: Callable[[], int]) -> Iterator[None]:
    """A context in which an error because the disk is full becomes a Failed of one line, with the
    bytes that there are `to_write` still, where that is known (0: it is not).
    """
    try:
        yield
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, UserError | Failed) or not (disk_full(cause) or disk_full(error)):
            raise
        free, needed = free_bytes(workdir), to_write()
        text = f"workdir={workdir}: the disk is full; {bytes_text(free)} are free"
        if needed:
            text += f" and about {bytes_text(needed)} still to be written"
        if needed > free:
            text += f", so {bytes_text(needed - free)} are missing"
        raise Failed(f"{text}. Make room; the same command goes on where this one was") from error


def bytes_text(count: float) -> str:
    """A number of bytes for people: `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # three digits are shown
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _partial(target: Path) -> Path:
    """A name that no other writer has, on whichever machine."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")
