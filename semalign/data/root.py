"""Where examples are read from."""

from __future__ import annotations

from pathlib import Path

from semalign.errors import UserError
from semalign.tasks.splits import HUB


def data_root(root: str) -> Path:
    """`zoo/data` -> the shipped miniature tasks; `hub` -> itself; anything else is a folder."""
    if root == str(HUB):
        return HUB
    if root.startswith("zoo/"):
        from semalign import zoo

        return zoo.path(root)
    path = Path(root).expanduser().resolve()
    if not path.is_dir():
        raise UserError(f"data.root={root}: no such folder; expected <root>/<task>/<split>.jsonl")
    return path
