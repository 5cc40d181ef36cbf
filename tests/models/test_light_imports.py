"""What transformers leaves out in a process of ours, and that others can import it as before."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
{before}
from semalign.models.light_imports import keep_imports_light
keep_imports_light()
from transformers import AutoModelForCausalLM
print([name for name in ("scipy", "sklearn") if name in sys.modules])
import scipy, sklearn
print(scipy.__name__, sklearn.__name__)
"""


def run(before: str) -> list[str]:
    command = [sys.executable, "-c", SCRIPT.format(before=before)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_neither_is_imported_and_both_can_be() -> None:
    assert run("") == ["[]", "scipy sklearn"]


def test_also_where_transformers_was_there_before() -> None:
    assert run("import transformers") == ["[]", "scipy sklearn"]
