"""The file of a shard: safetensors, of one tensor `rows` (positions, D), written in any order.

That is 8 bytes for the header's length, the header (JSON, padded to 8 bytes), then the numbers.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import torch

from semalign.data.dataset import Integers
from semalign.models.shapes import BYTES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class ShardWriter:
    """Puts rows of a shard's examples, `lengths` of each, in their places in one file a column."""

    def __init__(
        self, files: Sequence[BinaryIO], lengths: Sequence[int], *, width: int, dtype: str
    ) -> None:
        ends = list(itertools.accumulate(lengths))
        before = _header(sum(lengths), width, dtype)
        row = width * BYTES[dtype]
        self._files, self._lengths, self._dtype = files, lengths, DTYPES[dtype]
        self._starts = [len(before) + row * (e - n) for e, n in zip(ends, lengths, strict=True)]
        for file in files:
            file.write(before)

    def put(self, examples: Sequence[int], columns: Sequence[torch.Tensor]) -> None:
        """Write some examples' rows of each column, in main memory, one example after the other."""
        lengths = [self._lengths[example] for example in examples]
        for file, rows in zip(self._files, columns, strict=True):
            assert rows.dtype == self._dtype
            data = rows.contiguous().view(torch.uint8)
            for example, part in zip(examples, data.split(lengths), strict=True):
                file.seek(self._starts[example])
                file.write(part.numpy())


def column_bytes(rows: Integers, shard_examples: int, width: int, dtype: str) -> int:
    """Of one column on disk, to the byte, with so many rows an example."""
    counts = (
        np.add.reduceat(rows, range(0, len(rows), shard_examples)).tolist() if len(rows) else []
    )
    headers = sum(len(_header(count, width, dtype)) for count in counts)
    return headers + sum(counts) * width * BYTES[dtype]


@functools.lru_cache(maxsize=4096)
def _header(count: int, width: int, dtype: str) -> bytes:
    """What comes before the numbers of so many rows."""
    end = count * width * BYTES[dtype]
    tensor = {"dtype": _NAMES[dtype], "shape": [count, width], "data_offsets": [0, end]}
    text = json.dumps({"rows": tensor}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
