"""What lies in a work folder: artifacts, transfers and sweeps, by their manifests."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from semalign.errors import UserError, nearest

ARTIFACT_KINDS = (
    "attributions",
    "similarities",
    "activations",
    "bases",
    "maps",
    "factors",
    "records",
)
RUN_KINDS = ("transfers", "sweeps", "analyses")
UNFINISHED = "unfinished"  # checkpoints and the like of what is not made yet
FOLDER_KINDS = (*RUN_KINDS, *ARTIFACT_KINDS, UNFINISHED)


@dataclass(frozen=True)
class Entry:
    """A folder of a work folder. `kind` is the folder that it lies in."""

    kind: str
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def key(self) -> str:
        """The last part of the name; the whole of a name without one."""
        return self.name.rpartition("-")[2]

    @property
    def proof(self) -> Path:
        """The file that is written last."""
        return self.path / ("report.md" if self.kind == "sweeps" else "manifest.json")

    @property
    def finished(self) -> bool:
        return self.proof.exists()

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        return dict(read(self.path / "manifest.json") or {})

    @functools.cached_property
    def made(self) -> datetime:
        """When it was finished, or last changed."""
        if isinstance(text := self.manifest.get("made"), str):
            return datetime.fromisoformat(text).astimezone(UTC)
        files = [self.path, *self.path.rglob("*")]
        return datetime.fromtimestamp(max(f.stat().st_mtime for f in files), UTC)

    @property
    def age(self) -> float:
        """Seconds since then."""
        return (datetime.now(UTC) - self.made).total_seconds()

    @functools.cached_property
    def size(self) -> int:
        """Bytes of its files."""
        files = (f for f in self.path.rglob("*") if f.is_file() and not f.is_symlink())
        return sum(file.stat().st_size for file in files)

    @functools.cached_property
    def needs(self) -> frozenset[str]:
        """Keys of what it was made from; of a sweep, of its trials' transfers."""
        if self.kind != "sweeps":
            return frozenset(self.manifest.get("needs", ()))
        folders = [Path(trial["folder"]) for trial in self.trials.values() if "folder" in trial]
        return frozenset(Entry("transfers", folder).key for folder in folders)

    @functools.cached_property
    def trials(self) -> dict[str, dict[str, Any]]:
        """Of a sweep: its finished trials by id, with the folder and the records of each."""
        found = {file.stem: dict(read(file)) for file in sorted(self.path.glob("finished/*.json"))}
        for name, trial in found.items():
            trial["records"] |= (read(self.path / "reported" / f"{name}.json") or trial)["records"]
        return found


def read(file: Path) -> Any:
    """A JSON file, or None where there is none. Raises UserError for another one."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not JSON ({error}); delete the folder to make it again") from None


def entries(work: Path, kinds: Iterable[str] = FOLDER_KINDS) -> list[Entry]:
    """The folders of some kinds. Raises UserError when there is no such work folder."""
    if not work.is_dir():
        raise UserError(f"workdir={work}: does not exist; expected the folder of earlier runs")
    return [
        Entry(kind, path)
        for kind in kinds
        for path in sorted((work / kind).glob("*"))
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
    ]


def find_entry(work: Path, text: str, kinds: Sequence[str] = FOLDER_KINDS) -> Entry:
    """The entry that a path, a name, a key, or the beginning of either names.

    Raises UserError when none or several fit.
    """
    folder = Path(text).resolve()
    if folder.is_dir() and folder.parent.name in kinds:
        return Entry(folder.parent.name, folder)
    held = entries(work, kinds)
    exact = [entry for entry in held if text in (entry.name, entry.key)]
    found = exact or [e for e in held if e.name.startswith(text) or e.key.startswith(text)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(entry.name for entry in found)
        raise UserError(f"{text}: fits {names}; expected the name or the key of one")
    hint = nearest(text, [entry.name for entry in held])
    raise UserError(f"{text}: not in {work}; {hint}")


def age_text(seconds: float) -> str:
    """`3 h`, in the largest unit of which there is one."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


def seconds_of(text: str) -> float:
    """`30d`, `12h` or `45min` in seconds. Raises UserError for anything else."""
    units = {"d": 86_400, "h": 3600, "min": 60, "s": 1}
    unit = text.lstrip("0123456789.")
    try:
        return float(text.removesuffix(unit)) * units[unit]
    except (KeyError, ValueError):
        raise UserError(f"'{text}': expected an age such as 30d, 12h or 45min") from None
