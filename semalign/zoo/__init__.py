"""The embedded family: two small Llamas, a code variant of the larger one, and their four tasks."""

from __future__ import annotations

from pathlib import Path

from semalign.errors import UserError, nearest

MODELS = ("teacher", "student", "code-teacher")
ZOO_NAMES = tuple(f"zoo/{name}" for name in (*MODELS, "data"))


def path(name: str) -> Path:
    """The shipped folder behind a name such as "zoo/teacher" or "zoo/data".

    Raises UserError for any other name, or if the folder is missing.
    """
    if name not in ZOO_NAMES:
        raise UserError(f"'{name}' is not part of the zoo; {nearest(name, ZOO_NAMES)}")
    folder = Path(__file__).parent / name.removeprefix("zoo/")
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; `python -m semalign.zoo.recipe` makes it")
    return folder
