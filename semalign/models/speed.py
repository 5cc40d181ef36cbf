"""How fast a device multiplies matrices: what a plan's seconds are estimated by."""

from __future__ import annotations

import functools
import time

import torch

GPU = 1e14  # operations a second of a GPU that is not at hand: a round assumption
_SECONDS = 0.5  # of a probe, forward and backward together
_ROWS = 256


@functools.cache
def operations_per_second(dtype: str, width: int, device: str, threads: int = 1) -> float:
    """Operations a second of products as in a model of that width, forward and backward.

    Measured for about a second. Whatever is not a product, and starting processes, comes on top.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return GPU
    number = {"dtype": getattr(torch, dtype), "device": device}
    rows, weight = torch.ones(_ROWS, width, **number), torch.ones(4 * width, width, **number)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _seconds(rows, weight)  # the first calls choose kernels
        count, taken = 0, 0.0
        while taken < _SECONDS:
            count, taken = count + 1, taken + _seconds(rows, weight)
    finally:
        torch.set_num_threads(before)
    return 16.0 * _ROWS * width**2 * count / taken


def _seconds(rows: torch.Tensor, weight: torch.Tensor) -> float:
    """Of a product, and of the gradient of its input."""
    begin = time.perf_counter()
    (rows @ weight.T) @ weight
    if rows.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def duration_text(seconds: float) -> str:
    """A duration for people: `90 s`, `12 min`, `3.5 h`."""
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 100 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 3600:.3g} h"
