"""What of a work folder is deleted, and deleting it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from semalign.cli.folder import (
    ARTIFACT_KINDS,
    FOLDER_KINDS,
    RUN_KINDS,
    UNFINISHED,
    Entry,
    entries,
    find_entry,
    seconds_of,
)
from semalign.errors import UserError, nearest

_IN_USE = 3600  # seconds since the last change within which an unfinished folder is left alone


def chosen(
    work: Path, *, older_than: str | None, kinds: Sequence[str], runs: Sequence[str]
) -> list[Entry]:
    """What fits all the options that are given, without what a process may be making right now.

    Raises UserError when no option is given, and for unknown kinds and runs.
    """
    if older_than is None and not kinds and not runs:
        raise UserError("expected what to delete: --older-than, --kind or --run")
    for kind in kinds:
        if kind not in FOLDER_KINDS:
            raise UserError(f"--kind {kind}: {nearest(kind, FOLDER_KINDS)}")
    found = entries(work)
    if runs:
        named = [find_entry(work, run, RUN_KINDS) for run in runs]
        found = _with_own(named, found)
    if kinds:
        found = [entry for entry in found if entry.kind in kinds]
    least = 0.0 if older_than is None else seconds_of(older_than)
    return [e for e in found if e.age >= least and not _in_use(e)]


def _in_use(entry: Entry) -> bool:
    finished = entry.finished and entry.kind != UNFINISHED
    return not finished and entry.age < _IN_USE


def _with_own(named: Sequence[Entry], held: Iterable[Entry]) -> list[Entry]:
    """The runs, and all that they need and no other run does."""
    by_key: dict[str, list[Entry]] = {}
    for entry in held:
        by_key.setdefault(entry.key, []).append(entry)

    def reached(roots: Iterable[Entry]) -> dict[Path, Entry]:
        found: dict[Path, Entry] = {}
        todo = list(roots)
        while todo:
            entry = todo.pop()
            if entry.path not in found:
                found[entry.path] = entry
                todo += [need for key in entry.needs for need in by_key.get(key, ())]
        return found

    own = reached(named)
    others = [e for e in held if e.kind in RUN_KINDS and e.path not in own]
    kept = reached(others)
    return [entry for path, entry in own.items() if path not in kept or entry in named]


def delete(work: Path, found: Iterable[Entry]) -> None:
    """Delete the folders, and links to them; first what proves that one is whole."""
    for entry in found:
        entry.proof.unlink(missing_ok=True)
        shutil.rmtree(entry.path)
    for kind in (*RUN_KINDS, *ARTIFACT_KINDS):
        for link in (work / kind).glob("*"):
            if link.is_symlink() and not link.exists():
                link.unlink()
