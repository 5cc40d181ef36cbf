"""`semalign ls`: what there is to choose from, read from the registries."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from semalign.cli.app import app


class Listed(StrEnum):
    """What can be listed."""

    methods = "methods"
    strategies = "strategies"
    objectives = "objectives"
    maps = "maps"
    protocols = "protocols"
    tasks = "tasks"
    figures = "figures"
    models = "models"
    sweeps = "sweeps"


# kind -> the module and the name of its registry, and the setting that takes such a name
REGISTRIES: dict[str, tuple[str, str, str]] = {
    "methods": ("semalign.methods", "METHODS", "method"),
    "strategies": ("semalign.core.pairing", "STRATEGIES", "pairing.strategy"),
    "objectives": ("semalign.core.losses", "OBJECTIVES", "loss.objective"),
    "maps": ("semalign.stages.mapping", "MAPS", "alignment.map"),
    "protocols": ("semalign.tasks.protocols", "PROTOCOLS", "evaluation.protocol"),
    "tasks": ("semalign.tasks", "TASKS", "data.task, evaluation.tasks"),
    "figures": ("semalign.analysis", "FIGURES", "figure"),
}


@app.command("ls")
def ls_command(
    kinds: Annotated[
        list[Listed] | None,
        typer.Argument(help="What to list; by default everything.", show_default=False),
    ] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(help="A module or Python file to import first.", show_default=False),
    ] = None,
) -> None:
    """List what there is to choose from: methods, tasks and so on.

    Kinds: methods, strategies, objectives, maps, protocols, tasks, figures, models, sweeps.
    """
    from semalign.cli.tables import print_table
    from semalign.plugins import load_plugins

    load_plugins(plugin or ())
    for kind in kinds or Listed:
        if kind in REGISTRIES:
            module, name, setting = REGISTRIES[kind]
            registry = getattr(importlib.import_module(module), name)
            head, title = ["name", ""], f"{kind} ({setting})"
            rows = [[thing, description(kind, registry[thing])] for thing in registry]
        else:
            title, head, rows = _OTHERS[kind]()
        print_table(title, head, rows)
        print()


def description(kind: str, thing: Any) -> str:
    """One line about a registered thing: its `description`, or the first line of its docstring."""
    if kind == "protocols":
        return f"version {thing.version}: {', '.join(thing.profiles)}"
    text = getattr(thing, "description", None)
    if not isinstance(text, str):
        own = thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)
        text = inspect.cleandoc(own.__doc__ or "")
    first, _, _ = text.strip().partition("\n")
    extra = f" [{thing.kind}, {thing.metric}]" if kind == "tasks" else ""
    return f"{first}{extra}".strip()


def _models() -> tuple[str, list[str], list[list[str]]]:
    """The shipped models."""
    from semalign import zoo
    from semalign.cli.folder import read

    rows = []
    for name in (f"zoo/{model}" for model in zoo.MODELS):
        shape: Mapping[str, Any] = read(zoo.path(name) / "config.json")
        keys = ("num_hidden_layers", "hidden_size", "vocab_size")
        rows.append([name, *(str(shape[key]) for key in keys)])
    head = ["name", "layers", "width", "vocabulary"]
    return "models that are shipped; any folder or hub id will do (teacher, student)", head, rows


def _sweeps() -> tuple[str, list[str], list[list[str]]]:
    """The shipped sweeps."""
    from pathlib import Path

    from semalign.cli.shipped import shipped_sweeps
    from semalign.config.read import read_yaml

    rows = []
    for name, file in shipped_sweeps().items():
        tree = read_yaml(Path(file))
        rows.append([name, ", ".join(tree.get("axes", {})), str(tree.get("description", ""))])
    return "sweeps that are shipped (semalign ablate NAME)", ["name", "axes", ""], rows


_OTHERS: dict[str, Callable[[], tuple[str, list[str], list[list[str]]]]] = {
    "models": _models,
    "sweeps": _sweeps,
}
