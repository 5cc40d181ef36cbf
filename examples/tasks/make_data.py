"""Writes the data of the example tasks next to this file: `python examples/tasks/make_data.py`."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SPLITS = {"train": 96, "extract": 8, "dev": 24, "test": 24}
NAMES = ("Ann", "Ben", "Eva", "Leo", "Max", "Sue", "Tom", "Zoe")
KINDS = {
    "animal": ("cat", "dog", "hen", "cow", "pig", "fox"),
    "fruit": ("plum", "pear", "lime", "fig", "apple", "peach"),
    "tool": ("saw", "rake", "axe", "drill", "hammer", "spade"),
    "metal": ("tin", "lead", "iron", "gold", "silver", "copper"),
}
NOUNS = {"books": "Bücher", "boxes": "Kisten", "eggs": "Eier", "coins": "Münzen", "cards": "Karten"}
VERBS = {"has": "hat", "finds": "findet", "sells": "verkauft", "wants": "will"}


def kinds() -> Iterator[dict[str, Any]]:
    """Someone has a thing; which kind of thing it is."""
    for kind, things in KINDS.items():
        for thing, name in itertools.product(things, NAMES):
            yield {"text": f"{name} has a {thing}.", "label": kind}


def phrases() -> Iterator[dict[str, Any]]:
    """English sentences with their German."""
    for name, verb, number, noun in itertools.product(NAMES, VERBS, range(2, 10), NOUNS):
        german = f"{name} {VERBS[verb]} {number} {NOUNS[noun]}."
        yield {"english": f"{name} {verb} {number} {noun}.", "german": german}


def stories() -> Iterator[dict[str, Any]]:
    """Plain text without labels."""
    for name, noun, (first, second) in itertools.product(
        NAMES, NOUNS, itertools.combinations(range(2, 10), 2)
    ):
        yield {
            "text": f"{name} has {first} {noun}. {name} finds {second} more. "
            f"Now {name} has {first + second} {noun}."
        }


def write(task: str, rows: Iterable[dict[str, Any]]) -> None:
    """Rows in a fixed random order, a file a split; no row is in two splits."""
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    left = iter(shuffled)
    for split, count in SPLITS.items():
        file = HERE / "data" / task / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) for row in itertools.islice(left, count))
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    write("kinds", kinds())
    write("german", phrases())
    write("stories", stories())
