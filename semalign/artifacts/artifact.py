"""What is made: its identity, its costs, how it is made, and where it lies.

Running, planning and sweeping read the same objects: run makes those that are missing, plan adds
up the costs of those that are missing, and a sweep is the set of all its trials' artifacts by key.
"""

from __future__ import annotations

import functools
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from semalign.files import check_room, content_key, locked, making, read_json, write_json
from semalign.names import file_name

if TYPE_CHECKING:
    from semalign.artifacts.host import Host
    from semalign.models.reference import Model

Json = Any  # None, bool, int, float, str, and lists and mappings of these
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Floating-point operations, bytes that stay on disk, peak bytes of memory of one process."""

    operations: float = 0.0
    disk: int = 0
    memory: int = 0


class Artifact(ABC):
    """Files that are made once and found again by the content that determines them.

    `kind` names what it is and `folder` where those of its kind lie in the work folder. `schema` is
    raised when the code that makes this kind changes what it makes. `stage` is the name of the step
    in progress lines and plans.
    """

    kind: ClassVar[str]
    folder: ClassVar[str]
    stage: ClassVar[str]
    schema: ClassVar[int] = 1
    in_place: ClassVar[bool] = False  # made by many processes, part by part, in its final folder

    @property
    def label(self) -> str:
        """A readable beginning of the folder's name; no part of the identity."""
        return self.kind

    @property
    def location(self) -> Path | None:
        """A folder that the user has chosen instead of the one named by the key."""
        return None

    @abstractmethod
    def identity(self) -> Json:
        """Everything that determines the content, in addition to `needs`, and nothing else."""

    def needs(self) -> tuple[Artifact, ...]:
        """The artifacts that this one is made from."""
        return ()

    @property
    def models(self) -> tuple[Model, ...]:
        """The models that have to be in memory to make it."""
        return ()

    @property
    def parts(self) -> frozenset[Any]:
        """What is requested of an artifact that is made part by part; no part of the key."""
        return frozenset()

    def restricted(self, parts: frozenset[Any]) -> Self:
        """The request for these of its parts alone."""
        return self

    @property
    def trained_parameters(self) -> int:
        """How many parameters are trained to make it."""
        return 0

    @abstractmethod
    def cost(self) -> Cost:
        """From shapes alone; no weights are read."""

    @abstractmethod
    def make(self, folder: Path, host: Host) -> Mapping[str, Json]:
        """Fill an empty folder, in this process; returns what the manifest records of it."""

    def notes(self, manifest: Mapping[str, Json]) -> list[str]:
        """What the progress line tells about it, once it is made."""
        return []

    def check(self, folder: Path) -> None:  # noqa: B027 -- most have nothing to check
        """Raise UserError when what is there is damaged."""

    def is_made(self, folder: Path) -> bool:
        return (folder / MANIFEST).exists()

    def bytes_kept(self, folder: Path) -> int:
        """Of an artifact that is not whole, what is on disk and will not be written again."""
        return 0

    def joined(self, other: Self) -> Self:
        """The request for what both request; they have the same key."""
        return self

    @functools.cached_property
    def key(self) -> str:
        """Names the content: 16 hex digits."""
        needed = [need.key for need in self.needs()]
        return content_key(self.kind, self.schema, self.identity(), needed)


def union(artifacts: Iterable[Artifact]) -> list[Artifact]:
    """Each key once, in the order of the first; requests for the same key are joined."""
    found: dict[str, Artifact] = {}
    for artifact in artifacts:
        held = found.get(artifact.key)
        found[artifact.key] = artifact if held is None else held.joined(artifact)
    return list(found.values())


@dataclass(frozen=True)
class Workspace:
    """The work folder: where artifacts are found."""

    path: Path

    def place(self, artifact: Artifact) -> Path:
        """The artifact's folder, which may not be there yet.

        Artifacts of the same content may have been labelled otherwise: they are found by the key.
        """
        if artifact.location is not None:
            return artifact.location
        parent = self.path / artifact.folder
        named = parent / f"{file_name(artifact.label)}-{artifact.key}"
        if named.exists():
            return named
        return next(iter(parent.glob(f"*-{artifact.key}")), named)

    def has(self, artifact: Artifact) -> bool:
        return artifact.is_made(self.place(artifact))

    def missing(self, artifacts: Iterable[Artifact]) -> list[Artifact]:
        return [artifact for artifact in artifacts if not self.has(artifact)]

    def bytes_to_write(self, artifacts: Iterable[Artifact]) -> dict[Path, int]:
        """By folder, what making those that are missing adds to its disk: the work folder, and
        folders that the user has chosen.
        """
        found: dict[Path, int] = {}
        for artifact in self.missing(artifacts):
            folder = artifact.location or self.path
            needed = artifact.cost().disk - artifact.bytes_kept(self.place(artifact))
            found[folder] = found.get(folder, 0) + needed
        return found

    def check_room(self, artifacts: Iterable[Artifact]) -> None:
        """Raise UserError when a disk cannot hold those that are missing."""
        for folder, needed in self.bytes_to_write(artifacts).items():
            check_room(needed, folder)

    def manifest(self, artifact: Artifact) -> dict[str, Any]:
        return dict(read_json(self.place(artifact) / MANIFEST) or {})

    def scratch(self, artifact: Artifact) -> Path:
        """A folder for what is kept while the artifact is made, such as checkpoints."""
        return self.path / "unfinished" / f"{artifact.kind}-{artifact.key}"

    def ensure(self, artifact: Artifact, make: Callable[[Path], Mapping[str, Json]]) -> bool:
        """Make the artifact unless it is there; whether it had to be made.

        `make` fills an empty folder (or, `in_place`, the final one) and returns what the manifest
        records. Of several processes that want the same, one makes it and the others wait.
        """
        if self.has(artifact):
            return False
        with self.alone(artifact):
            if self.has(artifact):
                return False
            begin, target = time.monotonic(), self.place(artifact)
            if artifact.in_place:
                make(target)
                return True
            for left in target.parent.glob(f".{target.name}.*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with making(target) as folder:
                found = make(folder)
                self.finish(artifact, folder, found, time.monotonic() - begin)
        shutil.rmtree(self.scratch(artifact), ignore_errors=True)
        return True

    def alone(self, artifact: Artifact) -> Any:
        """A context in which no other process makes the same artifact."""
        file = self.path / "unfinished" / f"{artifact.kind}-{artifact.key}.lock"
        return locked(file, f"{artifact.stage} of the same content is being made")

    def finish(
        self, artifact: Artifact, folder: Path, found: Mapping[str, Json], seconds: float
    ) -> None:
        """Write the manifest, last of all files of an artifact."""
        write_json(
            folder / MANIFEST,
            {
                "kind": artifact.kind,
                "schema": artifact.schema,
                "key": artifact.key,
                "name": artifact.label,
                "identity": artifact.identity(),
                "needs": [need.key for need in artifact.needs()],
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": seconds,
                **found,
            },
        )


def ordered(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """The artifacts and all that they need, each key once, needs first."""
    found: list[Artifact] = []

    def visit(artifact: Artifact) -> None:
        for need in artifact.needs():
            visit(need)
        found.append(artifact)

    for artifact in artifacts:
        visit(artifact)
    return union(found)
