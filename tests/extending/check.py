"""What every addition has to show: it is listed, planned, run in this process, and swept.

A file with an addition registers it when it is loaded as a plugin, and not when pytest collects it.
Every process of a cluster loads plugins: what only the tests need is imported where they need it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

SMALL = ("data.train_limit=16", "training.epochs=1", "training.lr=1e-3", "evaluation.splits=[dev]")


def listed(kind: str, file: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The line of `semalign ls` for the thing that a file adds."""
    from semalign.cli import main

    assert main(["ls", kind, "--plugin", file]) == 0
    return capsys.readouterr().out


def planned(file: str, *settings: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `semalign transfer --plan` prints."""
    from semalign.cli import main

    assert main(["transfer", "--plan", f"plugins=[{file}]", *SMALL, *settings]) == 0
    return capsys.readouterr().out


def made(work: Path, file: str, *settings: str) -> dict:
    """The manifest of a transfer that is made in this process."""
    from semalign.artifacts.artifact import Workspace
    from semalign.artifacts.local import LocalExecutor
    from semalign.config.read import resolve
    from semalign.engine.transfer import make
    from semalign.methods.method import Transfer

    named = [f"workdir={work}", f"plugins=[{file}]"]
    prepared = Transfer.of(resolve([], [*SMALL, *named, *settings]))
    recipe = make(prepared, LocalExecutor(Workspace(work)))
    return Workspace(work).manifest(recipe.result)


def swept(folder: Path, file: str, axis: str, *base: str) -> int:
    """How many trainings a sweep over an axis is planned to make."""
    from semalign.sweep.file import load_sweep
    from semalign.sweep.plan import plan_sweep
    from semalign.sweep.trials import trials

    sweep = folder / "toy.yaml"
    sweep.write_text(f"base: {{plugins: [{file}]}}\naxes: {{{axis}}}\n")
    return plan_sweep(trials(load_sweep(sweep, [*SMALL[:3], *base]))).once.trainings
