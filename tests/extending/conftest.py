"""What a file registers is gone after its test: other tests see what semalign ships."""

from __future__ import annotations

import sys

import pytest

from semalign.core.losses import OBJECTIVES
from semalign.core.pairing import STRATEGIES
from semalign.methods import METHODS
from semalign.plugins import VARIABLE
from semalign.tasks import TASKS


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (METHODS, STRATEGIES, OBJECTIVES, TASKS):
        monkeypatch.setattr(registry, "_things", dict(registry))
    monkeypatch.setenv(VARIABLE, "")
    for name in ("method", "pairing", "objective", "task"):
        monkeypatch.delitem(sys.modules, f"test_toy_{name}", raising=False)
