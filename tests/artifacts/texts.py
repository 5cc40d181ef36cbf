"""A toy artifact, and what other processes do with it; without torch, so that they start soon."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semalign.artifacts.artifact import Artifact, Cost, Workspace
from semalign.files import check_writable

if TYPE_CHECKING:
    from semalign.artifacts.host import Host


@dataclass(frozen=True, kw_only=True, eq=False)
class Words(Artifact):
    """A text file; `title` is for people, `seconds` how long it takes."""

    kind = "words"
    folder = "texts"
    stage = "write"

    text: Any
    title: str = "words"
    seconds: float = 0.0
    sources: tuple[Artifact, ...] = ()

    @property
    def label(self) -> str:
        return self.title

    def identity(self) -> Any:
        return {"text": self.text}

    def needs(self) -> tuple[Artifact, ...]:
        return self.sources

    def cost(self) -> Cost:
        return Cost(operations=len(self.text))

    def make(self, folder: Path, host: Host) -> Mapping[str, Any]:
        time.sleep(self.seconds)
        (folder / "text").write_text(str(self.text))
        return {"length": len(self.text)}

    def notes(self, manifest: Mapping[str, Any]) -> list[str]:
        return [f"{manifest['length']} letters"]


class Next(Words):
    """The same kind of file, made by other code."""

    schema = 2


class Others(Words):
    kind = "others"


def ensure_text(folder: Path, start: Any, results: Any) -> None:
    """In a process of its own: make a text unless it is there, and note who wrote."""
    artifact = Words(text="shared")

    def make(target: Path) -> dict[str, Any]:
        with (folder / "writers").open("a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(0.7)
        (target / "text").write_text("shared")
        return {}

    start.wait()
    results.put((os.getpid(), Workspace(folder).ensure(artifact, make)))


def die_while_making(folder: Path) -> None:
    def make(target: Path) -> dict[str, Any]:
        (target / "text").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    Workspace(folder).ensure(Words(text="abc"), make)


def check_folders(folder: Path, start: Any) -> None:
    start.wait()
    for round in range(200):
        check_writable(folder / str(round))
