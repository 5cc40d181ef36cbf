"""Where examples are read from, which of them are scored, and all that is wrong with them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from semalign.config.sections import ROW_FILES, Evaluation
from semalign.errors import UserError
from semalign.tasks.splits import HUB, load_split
from semalign.tasks.task import Example


def data_root(root: str) -> Path:
    """`zoo/data` -> the shipped miniature tasks; `hub` -> itself; anything else is a folder, or the
    file of one split.
    """
    if root == str(HUB):
        return HUB
    if root.startswith("zoo/"):
        from semalign import zoo

        return zoo.path(root)
    path = Path(root).expanduser().resolve()
    if path.is_dir() or (path.is_file() and path.name.endswith(ROW_FILES)):
        return path
    there = ", ".join(sorted(entry.name for entry in path.parent.glob("*"))) or "nothing"
    raise UserError(
        f"data.root={root}: no such folder; expected <root>/<task>/<split>.jsonl, or the file of "
        f"one split; {path.parent} has {there}"
    )


def scored_examples(settings: Evaluation, root: Path, task: str, split: str) -> list[Example]:
    """The examples of a split that are scored: all, the first `limit`, or as many drawn by
    `limit_seed`, in the order of the file. Raises UserError as `load_split` does.
    """
    examples = load_split(root, task, split)
    if settings.limit_seed is None or settings.limit is None or settings.limit >= len(examples):
        return examples[: settings.limit]
    drawn = random.Random(settings.limit_seed).sample(range(len(examples)), settings.limit)
    return [examples[index] for index in sorted(drawn)]


def check_splits(wanted: Iterable[tuple[Path, str, str]]) -> None:
    """Raise one UserError with the faults of all (root, task, split), if there are any."""
    wanted = list(dict.fromkeys(wanted))
    faults: list[str] = []
    for root in dict.fromkeys(root for root, _, _ in wanted):
        here = [f"{task}/{split}" for place, task, split in wanted if place == root]
        if root.is_file() and len(here) > 1:
            faults.append(f"{root}: the file of one split, wanted are {', '.join(here)}")
    for root, task, split in wanted:
        try:
            load_split(root, task, split)
        except UserError as error:
            faults.append(str(error))
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        listed = "; ".join(f"({number}) {fault}" for number, fault in enumerate(faults, 1))
        raise UserError(f"data: {len(faults)} faults: {listed}")
