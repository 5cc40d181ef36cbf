"""Settings by dotted names (`loss.alpha`), and the trees of sections that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested or dotted settings -> dotted ones."""
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        settings |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return settings


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings -> the tree that `validate` takes; of a section and its parts, later wins."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        node = tree
        *path, last = key.split(".")
        for part in path:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[last] = value
    return tree


def lookup(tree: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key."""
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return value


def expand(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested, dotted or mixed settings -> a tree of sections; later ones win."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        node: Any = expand(value) if isinstance(value, Mapping) else value
        for part in reversed(str(key).split(".")):
            node = {part: node}
        merge(result, node)
    return result


def merge(base: dict[str, Any], update: Mapping[str, Any]) -> None:
    """Write the leaves of `update` into the tree `base`."""
    for key, value in update.items():
        if isinstance(value, Mapping):
            if not isinstance(base.get(key), dict):
                base[key] = {}
            merge(base[key], value)
        else:
            base[key] = value
