"""Making artifacts in this process, one after the other, without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from semalign.artifacts.artifact import Artifact, Json, Workspace
from semalign.artifacts.host import Host


class Executor(Protocol):
    """Makes artifacts where its resources are: in this process, or on a cluster."""

    @property
    def workspace(self) -> Workspace: ...

    def make(self, artifact: Artifact) -> Path:
        """The artifact's folder, whole; what it needs must be there."""


class Timer:
    """Seconds of each stage, and a line for each on the terminal.

    `quiet`: no line for what was cached.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.quiet = quiet

    def run(
        self, workspace: Workspace, artifact: Artifact, make: Callable[[Path], Mapping[str, Json]]
    ) -> Path:
        """Make the artifact by `make` unless it is there, and report it."""
        begin = time.monotonic()
        made = workspace.ensure(artifact, make)
        folder = workspace.place(artifact)
        if not made:
            artifact.check(folder)
        notes = [*([] if made else ["cached"]), *artifact.notes(workspace.manifest(artifact))]
        self.report(artifact.stage, time.monotonic() - begin, notes, cached=not made)
        return folder

    def report(
        self, stage: str, seconds: float, notes: Iterable[str], *, cached: bool = False
    ) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        if not (self.quiet and cached):
            print(f"[{stage}] {seconds:.1f} s  {'; '.join(notes)}", flush=True)


class LocalExecutor:
    """Makes artifacts in this process; a model is loaded once for all that needs it."""

    def __init__(self, workspace: Workspace, *, timer: Timer | None = None, **host: Any) -> None:
        self.workspace = workspace
        self.timer = timer or Timer()
        self.host = Host(workspace, **host)

    def make(self, artifact: Artifact) -> Path:
        return self.timer.run(
            self.workspace, artifact, lambda folder: artifact.make(folder, self.host)
        )


def make_all(executor: Executor, artifacts: Iterable[Artifact]) -> None:
    for artifact in artifacts:
        executor.make(artifact)
