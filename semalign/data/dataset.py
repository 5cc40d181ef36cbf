"""A tokenised split, hashed and measured once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from semalign.data.tokens import Tokens, fingerprint


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples as token ids of one model, in order."""

    tokens: Sequence[Tokens]

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def key(self) -> str:
        """A hash of order, ids and prompt lengths."""
        return fingerprint(self.tokens)

    @functools.cached_property
    def length(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.ids) for example in self.tokens)

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max((len(example.ids) for example in self.tokens), default=0)

    @functools.cached_property
    def supervised(self) -> int:
        """Positions whose next token is of an answer."""
        return sum(_width(example.supervised_positions) for example in self.tokens)

    def most_supervised(self, count: int) -> int:
        """Supervised positions of `count` examples, at most."""
        return self._most_supervised[min(count, len(self))]

    @functools.cached_property
    def _most_supervised(self) -> tuple[int, ...]:
        widths = (_width(example.supervised_positions) for example in self.tokens)
        return tuple(itertools.accumulate(sorted(widths, reverse=True), initial=0))

    def positions(self, positions: str) -> tuple[int, ...]:
        """How many positions of each example are stored and aligned: `all` or the `answer`'s."""
        return self._positions[positions]

    @functools.cached_property
    def _positions(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(_width(example.align_positions(name)) for example in self.tokens)
            for name in ("all", "answer")
        }


def _width(where: slice) -> int:
    return int(where.stop - where.start)
