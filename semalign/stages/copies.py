"""Rows between main memory and a device, without the host waiting for a GPU.

Memory that a GPU copies from or to by itself is pinned; on a CPU nothing is copied twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def joined(parts: list[Tensor], device: torch.device) -> Tensor:
    """The rows of all parts one after the other, in main memory, ready to be sent to `device`."""
    shape = sum(map(len, parts)), *parts[0].shape[1:]
    rows = torch.empty(shape, dtype=parts[0].dtype, pin_memory=device.type == "cuda")
    return torch.cat(parts, out=rows)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of main memory on `device`, whose later work waits for it, not the host."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


class Fetched:
    """A tensor on its way from a device to main memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._there = tensor, None
        if tensor.device.type == "cuda":
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor = host.copy_(tensor, non_blocking=True)
            self._there = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> Tensor:
        """The tensor, once it is there."""
        if self._there is not None:
            self._there.synchronize()
        return self._tensor


class Ahead(Generic[Made]):
    """Makes what a function makes of a list of examples, in a thread ahead of its use."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._begun: tuple[list[int], Future[Made]] | None = None

    def begin(self, make: Callable[[list[int]], Made], examples: list[int]) -> None:
        """Begin to make what `take` of the same examples will return."""
        self._begun = examples, self._thread.submit(make, examples)

    def take(self, make: Callable[[list[int]], Made], examples: list[int]) -> Made:
        """What is made of the examples, here and now unless it was begun."""
        begun, self._begun = self._begun, None
        if begun is None or begun[0] != examples:
            return make(examples)
        return begun[1].result()


@contextmanager
def behind() -> Iterator[Callable[[Callable[[], None]], None]]:
    """A function that has a thread do something, once what it was given before is done.

    All is done when the context ends. Raises the thread's error there, or where more is given.
    """
    begun: list[Future[None]] = []
    with ThreadPoolExecutor(max_workers=1) as thread:

        def begin(act: Callable[[], None]) -> None:
            if begun:
                begun.pop().result()
            begun.append(thread.submit(act))

        yield begin
        if begun:
            begun.pop().result()
