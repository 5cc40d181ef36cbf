"""Fewer seconds until a process of ours can load a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What transformers imports wherever it is installed, for detection losses and assisted decoding.
_UNUSED = ("sklearn", "scipy")


def keep_imports_light() -> None:
    """Let transformers take SciPy and scikit-learn for absent in this process.

    Importing them takes a third of the time until a model's classes are there, and nothing of ours
    reaches what needs them. Others can import both as before. For processes that run our code
    alone: in a notebook, transformers has all that is installed.
    """
    with _hidden(*_UNUSED):
        from transformers.utils import import_utils

        for name in _UNUSED:
            available = getattr(import_utils, f"is_{name}_available")
            available.cache_clear()
            available()  # which remembers its answer


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Within the context these packages, where they are not imported yet, cannot be found."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
