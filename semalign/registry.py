"""Named things that users can add to, such as methods, pairing strategies, tasks and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from semalign.errors import UserError, nearest

Thing = TypeVar("Thing")


class Registry(Mapping[str, Thing], Generic[Thing]):
    """The registered things of one kind by name, in the order of their registration.

    `kind` is what error messages call them, such as "method". `made` makes things that are
    registered at their first use, and returns None for other names.
    """

    def __init__(self, kind: str, made: Callable[[str], Thing | None] | None = None) -> None:
        self.kind = kind
        self._made = made
        self._things: dict[str, Thing] = {}

    def register(self, name: str, thing: Thing) -> Thing:
        """Add or replace a thing; returns it."""
        self._things[name] = thing
        return thing

    def find(self, name: str, setting: str | None = None) -> Thing:
        """The thing of that name. Raises UserError with the setting and the nearest name."""
        if name not in self:
            where = f"{setting}={name}:" if setting else f"{self.kind} '{name}' is unknown;"
            raise UserError(f"{where} {nearest(name, self._things)}")
        return self[name]

    def __getitem__(self, name: str) -> Thing:
        if name not in self._things and self._made and (thing := self._made(name)) is not None:
            return thing
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)
