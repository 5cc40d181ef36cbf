"""EQUATIONS.md names functions and tests that exist, and every formula of bases, alignment and
losses, and every pairing strategy that has one.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from semalign.core.pairing import STRATEGIES

ROOT = Path(__file__).parents[2]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py):(\w+)`", (ROOT / "EQUATIONS.md").read_text())))


@pytest.mark.parametrize(("file", "function"), NAMED)
def test_what_the_table_names_exists(file: str, function: str) -> None:
    assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_the_table_covers_the_formulas() -> None:
    for name in ("bases", "alignment", "losses"):
        source = (ROOT / "semalign" / "core" / f"{name}.py").read_text()
        functions = set(re.findall(r"^def ([a-z]\w+)\(", source, re.MULTILINE))
        formulas = {function for function in functions if not function.startswith("register_")}
        assert formulas <= {function for _, function in NAMED}
    named = {function for _, function in NAMED}
    assert set(STRATEGIES) - {"explicit", "last", "random"} <= named
