"""Configuration files as text: starters of every setting, and resolved settings by source."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from semalign.cli.settings import schema_of
from semalign.config.describe import Setting, leaf_settings, yaml_text
from semalign.config.read import resolve_with_sources

_WIDTH = 95
_COLUMN = 44  # where a comment begins, if there is room
_USE = "## Take the # away from what you want to set. Dotted and nested keys may be mixed.\n"
_AXES = """\
## What varies. A grid of values, a range (uniform, loguniform or randint, with `samples`), or named
## cases that set several settings together; each combination and seed is a trial.
# axes.loss.alpha: [0, 0.1, 0.3]
# axes.loss.beta: {uniform: [0, 1]}
# axes.variant: {cases: {cross-entropy: {loss.alpha: 0}, dual: {alignment.map: dual}}}
"""


def starter(job: str) -> str:
    """A file for a job, or for a `sweep`, in which every setting is commented out."""
    if job == "sweep":
        return "".join(_sweep())
    head = f"## A configuration for `semalign {job}`.\n{_USE}"
    return head + "".join(_commented(leaf_settings(schema_of(job)).values()))


def _sweep() -> Iterator[str]:
    yield f"## A sweep for `semalign ablate`.\n{_USE}"
    keys = leaf_settings(schema_of("sweep")).values()
    yield from _commented([key for key in keys if key.name not in ("base", "axes")])
    yield f"\n{_AXES}"
    yield "\n## Settings of every trial.\n"
    yield from _commented(leaf_settings(schema_of("transfer")).values(), "base.")


def _commented(settings: Sequence[Setting] | Any, prefix: str = "") -> Iterator[str]:
    section = None
    for setting in settings:
        if setting.section != section:
            section = setting.section
            yield f"\n## ---- {section or 'general'}\n"
        words = f"{setting.description} ({setting.type})"
        yield "\n" + _filled(words)
        default = "" if setting.required else f" {yaml_text(setting.default)}"
        yield f"\n# {prefix}{setting.name}:{default}\n"


def _filled(words: str) -> str:
    lines = textwrap.wrap(words, _WIDTH, break_on_hyphens=False)
    return "\n".join(f"## {line}" for line in lines)


def sourced(files: Sequence[str], overrides: Sequence[str], schema: type[Any]) -> str:
    """The resolved settings as YAML, each with a comment of where it came from."""
    config, sources = resolve_with_sources(files, overrides, schema)
    return "".join(_lines(config.model_dump(mode="json"), sources))


def _lines(tree: Mapping[str, Any], sources: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:\n"
            yield from _lines(value, sources, f"{prefix}{key}.")
        else:
            yield f"{f'{indent}{key}: {yaml_text(value)}':<{_COLUMN}}  # {sources[prefix + key]}\n"
