"""Hidden states of a model at the layers that are needed, computed once and stored."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from semalign.artifacts.activations import ActivationStore, Column
from semalign.artifacts.artifact import MANIFEST, Artifact, Cost, Json
from semalign.artifacts.host import Host
from semalign.artifacts.shards import DTYPES, ShardWriter, column_bytes
from semalign.config.sections import Extraction
from semalign.core.pairing import paper_number
from semalign.data.batches import length_buckets, pad, places
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens, count_positions
from semalign.files import read_json
from semalign.models.decoder import capture, find_decoder, run_base
from semalign.models.memory import Batch, loading, weights
from semalign.models.partial import stopping_after
from semalign.models.reference import Model
from semalign.models.shapes import BYTES
from semalign.stages.copies import Fetched, behind, sent


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
        """Peak bytes with a share of the model's weights: what a batch computes, its hidden states
        in all columns, and the rows of the one before, which are written meanwhile.
        """
        settings, longest = self.extraction, max(1, self.rows.longest)
        examples = min(len(self.rows), settings.shard_examples)
        batch = Batch(self.model, max(1, min(examples, settings.batch_tokens // longest)), longest)
        states = len(self.columns) * batch.states
        rows = states * BYTES[self.dtype] // BYTES[self.model.dtype]
        held = states + rows + max(batch.forward, rows)  # those of the batch follow its pass
        return max(loading(self.model, share=share), int(share * weights(self.model)) + held)

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
            [self.rows[example] for example in store.shard_of(shard)],
            batch_tokens=self.extraction.batch_tokens,
        )

    def notes(self, manifest: Mapping[str, Any]) -> list[str]:
        size = len(self.columns) * self.column_bytes
        layers = ", ".join(f"{c.interface} {paper_number(c.layer)}" for c in sorted(self.columns))
        return [f"layers (counted from 1): {layers}", f"{size / 1e6:.1f} MB"]


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
    the deepest of them is run. A batch's rows come to main memory, and go on to their places in the
    files, while the next is computed. Memory: batch_tokens * D per column of two batches.
    """
    decoder = find_decoder(model)
    device, dtype = next(model.parameters()).device, DTYPES[store.dtype]
    wanted = [(column.layer, column.interface) for column in columns]
    # what goes into a layer is computed by those below it
    deepest = max(column.layer - (column.interface == "input") for column in columns)
    lengths = [count_positions(e.align_positions(store.positions)) for e in tokens]
    with (
        store.writer(columns, shard, lengths, width=decoder.lm_head.weight.shape[1]) as writer,
        behind() as begin,
        stopping_after(decoder, deepest),
        capture(decoder, wanted) as seen,
    ):
        for batch in length_buckets(tokens, batch_tokens):
            members = [tokens[index] for index in batch]
            ids, mask = pad(members, pad_id=0)
            chosen = places(members, lambda e: e.align_positions(store.positions), ids.shape[1])
            run_base(decoder, sent(ids, device), sent(mask, device))
            rows = (_chosen(seen[key], chosen).to(dtype) for key in wanted)
            begin(functools.partial(_write, writer, batch, [Fetched(column) for column in rows]))
    return sum(lengths)


def _write(writer: ShardWriter, batch: Sequence[int], columns: Sequence[Fetched]) -> None:
    writer.put(batch, [column.wait() for column in columns])


def _chosen(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return hidden.flatten(0, 1).index_select(0, sent(places, hidden.device))
