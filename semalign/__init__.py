"""SemAlign: transfer knowledge from a large language model to a smaller one through activations.

The public API, loaded when it is used. `docs/api.md` has it on one page.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from semalign import core
    from semalign.api import (
        TransferResult,
        attribute,
        evaluate,
        pairs,
        semantic_bases,
        semantic_map,
        transfer,
    )
    from semalign.core.losses import register_objective
    from semalign.core.pairing import register_pairing
    from semalign.errors import UserError
    from semalign.methods.method import register_method
    from semalign.models.decoder import capture, find_decoder, run_base
    from semalign.models.loading import load_model, load_tokenizer
    from semalign.models.partial import run_from, stopping_after
    from semalign.stages.mapping import register_map
    from semalign.tasks.registry import register_task

_WHERE = {
    "semalign.api": (
        "TransferResult",
        "attribute",
        "evaluate",
        "pairs",
        "semantic_bases",
        "semantic_map",
        "transfer",
    ),
    "semalign.core.losses": ("register_objective",),
    "semalign.core.pairing": ("register_pairing",),
    "semalign.errors": ("UserError",),
    "semalign.methods.method": ("register_method",),
    "semalign.models.decoder": ("capture", "find_decoder", "run_base"),
    "semalign.models.loading": ("load_model", "load_tokenizer"),
    "semalign.models.partial": ("run_from", "stopping_after"),
    "semalign.stages.mapping": ("register_map",),
    "semalign.tasks.registry": ("register_task",),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "TransferResult",
    "UserError",
    "attribute",
    "capture",
    "core",
    "evaluate",
    "find_decoder",
    "load_model",
    "load_tokenizer",
    "pairs",
    "register_map",
    "register_method",
    "register_objective",
    "register_pairing",
    "register_task",
    "run_base",
    "run_from",
    "semantic_bases",
    "semantic_map",
    "stopping_after",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name == "core":
        return importlib.import_module("semalign.core")
    if name not in _MODULES:
        raise AttributeError(f"module 'semalign' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
