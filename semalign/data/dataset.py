"""A tokenised split: many examples in a few arrays, hashed and measured once.

Pickled, the arrays travel as buffers: the workers of a machine share one copy of them in Ray's
object store, where a list of tuples would be built again in each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from semalign.data.tokens import Aligned, Tokens, fingerprint

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class _Lists:
    """Lists of integers, one after the other: list i is values[bounds[i]:bounds[i + 1]]."""

    values: Integers
    bounds: Integers

    @staticmethod
    def of(lists: Sequence[Sequence[int]], dtype: type[np.integer[Any]]) -> _Lists:
        bounds = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([len(one) for one in lists], out=bounds[1:])
        return _Lists(np.fromiter(chain.from_iterable(lists), dtype, count=bounds[-1]), bounds)

    def __getitem__(self, index: int) -> Integers:
        return self.values[self.bounds[index] : self.bounds[index + 1]]

    def below(self, limits: Integers) -> Integers:
        """How many values of each list are smaller than its limit."""
        smaller = np.zeros(len(self.values) + 1, dtype=np.int64)
        np.cumsum(self.values < np.repeat(limits, np.diff(self.bounds)), out=smaller[1:])
        return smaller[self.bounds[1:]] - smaller[self.bounds[:-1]]


class Dataset(Sequence[Tokens]):
    """Examples as token ids of one model, in order; each is built when it is read."""

    def __init__(self, examples: Iterable[Tokens]) -> None:
        rows = list(examples)
        self._names = _Lists.of([row.id.encode() for row in rows], np.uint8)
        self._ids = _Lists.of([row.ids for row in rows], np.int32)
        self._prompts = np.array([row.prompt_length for row in rows], dtype=np.int64)
        self._everywhere = np.array([row.aligned is None for row in rows], dtype=bool)
        found = [row.aligned or Aligned((), ()) for row in rows]
        self._aligned = {
            name: _Lists.of([getattr(aligned, name) for aligned in found], np.int32)
            for name in ("all", "answer")
        }

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        aligned = None
        if not self._everywhere[place]:
            aligned = Aligned(
                **{name: tuple(lists[place].tolist()) for name, lists in self._aligned.items()}
            )
        return Tokens(
            id=self._names[place].tobytes().decode(),
            ids=tuple(self._ids[place].tolist()),
            prompt_length=int(self._prompts[place]),
            aligned=aligned,
        )

    @property
    def _lengths(self) -> Integers:
        return np.diff(self._ids.bounds)

    @functools.cached_property
    def key(self) -> str:
        """A hash of order, ids, prompt lengths and aligned positions."""
        return fingerprint(self)

    @functools.cached_property
    def whole(self) -> Dataset:
        """The same examples with every position, whatever another tokenizer's ids have."""
        if self._everywhere.all():
            return self
        return Dataset([replace(example, aligned=None) for example in self])

    @functools.cached_property
    def length(self) -> int:
        """Tokens of all examples."""
        return int(self._lengths.sum())

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self._lengths.max(initial=0))

    @functools.cached_property
    def supervised(self) -> int:
        """Positions whose next token is of an answer."""
        return int((self._lengths - self._prompts).sum())

    def most_supervised(self, count: int) -> int:
        """Supervised positions of `count` examples, at most."""
        return int(self._most_supervised[min(count, len(self))])

    @functools.cached_property
    def _most_supervised(self) -> Integers:
        widths = np.sort(self._lengths - self._prompts)[::-1]
        return np.concatenate([[0], np.cumsum(widths)])

    def positions(self, positions: str) -> Integers:
        """How many positions of each example are stored and aligned: `all` or the `answer`'s."""
        return self._positions[positions]

    @functools.cached_property
    def _positions(self) -> dict[str, Integers]:
        lengths, prompts = self._lengths, self._prompts
        every = {"all": lengths, "answer": np.maximum(prompts, lengths - 1) - prompts + 1}
        return {
            name: np.where(self._everywhere, every[name], aligned.below(lengths))
            for name, aligned in self._aligned.items()
        }
