"""Hidden states of a model at the layers that are needed, computed once and stored."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from semalign.artifacts.activations import DTYPES, ActivationStore, Column
from semalign.artifacts.artifact import MANIFEST, Artifact, Cost, Json
from semalign.artifacts.host import Host
from semalign.config.sections import Extraction
from semalign.core.pairing import paper_number
from semalign.data.batches import length_buckets, pad
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens
from semalign.files import read_json
from semalign.models.decoder import capture, find_decoder, run_base
from semalign.models.memory import Batch, loading, weights
from semalign.models.partial import stopping_after
from semalign.models.reference import Model
from semalign.models.shapes import BYTES

_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Activations(Artifact):
    """Columns of one store: the hidden states of `model` on `rows` at `positions`, in `dtype`.

    All requests for the same model, rows, positions and dtype share a store, whatever their
    `columns`. `extraction` gives the size of shards and batches, and may name a folder.
    """

    kind = "activations"
    folder = "activations"
    stage = "extract"
    in_place = True

    model: Model
    rows: Dataset
    columns: frozenset[Column]
    positions: str
    dtype: str
    extraction: Extraction

    @property
    def label(self) -> str:
        return Path(self.model.path).name

    @property
    def location(self) -> Path | None:
        chosen = self.extraction.store
        return None if chosen is None else Path(chosen).expanduser().resolve()

    def identity(self) -> Json:
        return {
            "model": self.model.identity,
            "rows": self.rows.key,
            "positions": self.positions,
            "dtype": self.dtype,
        }

    @property
    def models(self) -> tuple[Model, ...]:
        return (self.model,)

    @property
    def depth(self) -> int:
        """How many of the model's layers have to be computed."""
        return max(column.layer for column in self.columns) + 1

    @property
    def parts(self) -> frozenset[Column]:
        return self.columns

    def restricted(self, parts: frozenset[Column]) -> Self:
        return replace(self, columns=parts)

    def joined(self, other: Self) -> Self:
        return self.restricted(self.columns | other.columns)

    def cost(self) -> Cost:
        """A forward pass up to the deepest column."""
        if not self.columns:
            return Cost()
        shape, columns = self.model.shape, len(self.columns)
        layers = self.depth * shape.per_layer
        return Cost(
            operations=2.0 * layers * self.rows.length,
            disk=columns * self.column_bytes,
            memory=self._memory((layers + shape.embedding + shape.head) / shape.weights),
        )

    def _memory(self, share: float) -> int:
        """Peak bytes with a share of the model's weights: a batch, and the rows of a shard of all
        columns, of which one is joined and written at a time.
        """
        settings, longest = self.extraction, max(1, self.rows.longest)
        examples = min(len(self.rows), settings.shard_examples)
        batch = Batch(self.model, max(1, min(examples, settings.batch_tokens // longest)), longest)
        positions = _largest_shard(self.rows.positions(self.positions), settings.shard_examples)
        column = positions * self.model.width * BYTES[self.dtype]
        columns = len(self.columns)
        computed = batch.forward + columns * (batch.states + column)
        held = int(share * weights(self.model)) + max(computed, (columns + 3) * column)
        return max(loading(self.model, share=share), held)

    def bytes_kept(self, folder: Path) -> int:
        return sum(
            shard.stat().st_size
            for column in self.columns
            for shard in (folder / str(column)).glob("[0-9]*.safetensors")
        )

    @property
    def column_bytes(self) -> int:
        """Of one column on disk, to the byte."""
        rows, shard = self.rows.positions(self.positions), self.extraction.shard_examples
        return column_bytes(rows, shard, self.model.width, self.dtype)

    def is_made(self, folder: Path) -> bool:
        listed = (read_json(folder / MANIFEST) or {"columns": {}})["columns"]
        return all(str(column) in listed for column in self.columns)

    def check(self, folder: Path) -> None:
        self.open(folder).verify(self.columns)

    def open(self, folder: Path) -> ActivationStore:
        """The store, begun if it is not there."""
        return ActivationStore(
            folder,
            {"model": self.model.identity, "rows": self.rows.key, "width": self.model.width},
            examples=len(self.rows),
            positions=self.positions,
            dtype=self.dtype,
            shard_examples=self.extraction.shard_examples,
            key=self.key,
            name=self.label,
        )

    def make(self, folder: Path, host: Host) -> Mapping[str, Json]:
        store = self.open(folder)
        for shard, columns in store.missing(self.columns).items():
            self.make_shard(store, shard, columns, host)
        store.commit(self.columns)
        return {}

    def make_shard(
        self, store: ActivationStore, shard: int, columns: Sequence[Column], host: Host
    ) -> None:
        """Write some columns of one shard; what another process wrote is overwritten alike."""
        [model] = host.models(self.model, layers=max(column.layer for column in columns) + 1)
        extract_shard(
            model,
            store,
            shard,
            columns,
            [self.rows.tokens[example] for example in store.shard_of(shard)],
            batch_tokens=self.extraction.batch_tokens,
        )

    def notes(self, manifest: Mapping[str, Any]) -> list[str]:
        size = len(self.columns) * self.column_bytes
        layers = ", ".join(f"{c.interface} {paper_number(c.layer)}" for c in sorted(self.columns))
        return [f"layers (counted from 1): {layers}", f"{size / 1e6:.1f} MB"]


@functools.lru_cache(maxsize=64)
def _largest_shard(rows: tuple[int, ...], shard_examples: int) -> int:
    """Rows of the shard that has the most."""
    starts = range(0, len(rows), shard_examples)
    return max((sum(rows[start : start + shard_examples]) for start in starts), default=0)


@functools.lru_cache(maxsize=64)
def column_bytes(rows: tuple[int, ...], shard_examples: int, width: int, dtype: str) -> int:
    """Of one column on disk, to the byte, with so many rows an example.

    A shard is a safetensors file: 8 bytes for the length of its header, the header (JSON, padded to
    8 bytes), then the numbers.
    """
    size = 0
    for start in range(0, len(rows), shard_examples):
        shape = [sum(rows[start : start + shard_examples]), width]
        data = shape[0] * width * BYTES[dtype]
        tensor = {"dtype": _SAFETENSORS[dtype], "shape": shape, "data_offsets": [0, data]}
        header = len(json.dumps({"rows": tensor}, separators=(",", ":")))
        size += 8 + 8 * math.ceil(header / 8) + data
    return size


class Prefix(Activations):
    """The student's inputs of its first trained layers: what the layers below compute, once."""

    stage = "prefix"

    @property
    def location(self) -> None:
        return None


@torch.inference_mode()
def extract_shard(
    model: nn.Module,
    store: ActivationStore,
    shard: int,
    columns: Sequence[Column],
    tokens: Sequence[Tokens],
    *,
    batch_tokens: int,
) -> int:
    """Write `columns` of one shard; returns its row count.

    tokens: the shard's examples, in order. One forward pass serves all columns, and no layer above
    the deepest of them is run. Memory: batch_tokens * D per column on the device, and the shard's
    rows on the host.
    """
    decoder = find_decoder(model)
    kept: dict[Column, list[torch.Tensor | None]] = {c: [None] * len(tokens) for c in columns}
    device = next(model.parameters()).device
    dtype = DTYPES[store.dtype]
    deepest = max(column.layer for column in columns)
    wanted = [(column.layer, column.interface) for column in columns]
    with stopping_after(decoder, deepest), capture(decoder, wanted) as seen:
        for batch in length_buckets(tokens, batch_tokens):
            members = [tokens[index] for index in batch]
            ids, mask = pad(members, pad_id=0)
            run_base(decoder, ids.to(device), mask.to(device))
            for column in columns:
                hidden = seen[(column.layer, column.interface)]
                for row, index in enumerate(batch):
                    where = tokens[index].align_positions(store.positions)
                    # clone: a slice would keep the whole padded batch alive
                    kept[column][index] = hidden[row, where].to("cpu", dtype, copy=True)
    rows = 0
    for column, parts in kept.items():
        joined = torch.cat([part for part in parts if part is not None])
        store.write(column, shard, joined)
        rows = len(joined)
    return rows
