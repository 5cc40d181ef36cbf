"""The activation store: hidden states of a model at given positions, on disk, memory-mapped.

    <store>/identity.json           what the activations are of; written first
    <store>/mlp.3/00000.safetensors rows (positions, D) of one shard; layer 3 counts from 0
    <store>/manifest.json           columns, shards, row counts, checksums; written last

A column is one (interface, layer). A shard that exists is whole; the manifest lists a column once
all of its shards are there. Reading copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from semalign.artifacts.artifact import MANIFEST
from semalign.artifacts.shards import ShardWriter
from semalign.data.dataset import Dataset, Integers
from semalign.errors import UserError
from semalign.files import locked, read_json, sha256, write_json, writing

_IDENTITY = "identity.json"


@dataclass(frozen=True, order=True)
class Column:
    """A layer (0-based) and what is captured there: `input`, `attn`, `mlp`, `block` or `final`."""

    layer: int
    interface: str

    def __str__(self) -> str:
        return f"{self.interface}.{self.layer}"


class ActivationStore:
    """Open or begin a store at `path` for activations of that `identity`.

    `examples` is their number; `positions` which of their positions are stored, in `dtype`. Shards
    of a new store hold `shard_examples` examples each; one that is there keeps its own size. `key`
    and `name` are for the manifest.

    Raises UserError when the folder holds something else, saying which fields differ.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        examples: int,
        positions: str,
        dtype: str,
        shard_examples: int,
        key: str = "",
        name: str = "",
    ) -> None:
        self.key, self.name = key, name
        self.path, self.examples, self.positions, self.dtype = path, examples, positions, dtype
        self.identity = {**identity, "examples": examples, "positions": positions, "dtype": dtype}
        self._open: dict[Path, torch.Tensor] = {}
        found = read_json(path / _IDENTITY)
        if found is None:
            with locked(path.parent / f".{path.name}.lock", "a store of the same name is begun"):
                found = read_json(path / _IDENTITY)
                if found is None:
                    found = {**self.identity, "shard_examples": shard_examples}
                    write_json(path / _IDENTITY, found)
        held = {name: value for name, value in found.items() if name != "shard_examples"}
        if held != self.identity:
            names = sorted(
                n for n in {*held, *self.identity} if held.get(n) != self.identity.get(n)
            )
            both = [(n, str(held.get(n))[:24], str(self.identity.get(n))[:24]) for n in names]
            what = "; ".join(f"{name}: has {has}, wanted {want}" for name, has, want in both)
            raise UserError(f"{path}: this store does not fit the request ({what})")
        self.shard_examples = int(found["shard_examples"])
        self.num_shards = -(-examples // self.shard_examples)
        self.columns = self._read_columns()

    def _read_columns(self) -> dict[str, list[dict[str, Any]]]:
        return dict((read_json(self.path / MANIFEST) or {"columns": {}})["columns"])

    def shard_path(self, column: Column, shard: int) -> Path:
        return self.path / str(column) / f"{shard:05d}.safetensors"

    def shard_of(self, shard: int) -> range:
        """Example indices of a shard."""
        size = self.shard_examples
        return range(shard * size, min((shard + 1) * size, self.examples))

    def missing(self, columns: Iterable[Column]) -> dict[int, list[Column]]:
        """Shard -> the columns still to be computed for it; empty when there is nothing to do."""
        result: dict[int, list[Column]] = {}
        for column in sorted(set(columns)):
            if str(column) in self.columns:
                continue
            for shard in range(self.num_shards):
                if not self.shard_path(column, shard).exists():
                    result.setdefault(shard, []).append(column)
        return result

    @contextmanager
    def writer(
        self, columns: Iterable[Column], shard: int, lengths: Sequence[int], width: int
    ) -> Iterator[ShardWriter]:
        """Takes the rows of one shard's columns, of `lengths` an example, in any order; the files
        are there when the context ends without an error.
        """
        with ExitStack() as stack:
            partials = [
                stack.enter_context(writing(self.shard_path(column, shard))) for column in columns
            ]
            files = [stack.enter_context(partial.open("wb")) for partial in partials]
            yield ShardWriter(files, lengths, width=width, dtype=self.dtype)

    def commit(self, columns: Iterable[Column]) -> None:
        """List whole columns in the manifest, with checksums; reads each shard once. What others
        have listed meanwhile stays.
        """
        new: dict[str, list[dict[str, Any]]] = {}
        for column in sorted(set(columns)):
            if str(column) in self.columns:
                continue
            shards = []
            for shard in range(self.num_shards):
                file = self.shard_path(column, shard)
                rows, width = self._load(file).shape
                shards.append(
                    {"file": file.name, "rows": rows, "width": width, "sha256": sha256(file)}
                )
            new[str(column)] = shards
        if not new:
            return
        with locked(self.path / ".manifest.lock", "columns of the same store are listed"):
            self.columns = self._read_columns() | new
            manifest = {
                "layer_numbers": "from 0",
                "kind": "activations",
                "key": self.key,
                "name": self.name,
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "identity": self.identity,
                "columns": self.columns,
            }
            write_json(self.path / MANIFEST, manifest)

    def verify(self, columns: Iterable[Column]) -> None:
        """Compare every shard with its checksum; UserError names the first file that differs."""
        for column in columns:
            for shard, entry in enumerate(self._entries(column)):
                file = self.shard_path(column, shard)
                if not file.exists() or sha256(file) != entry["sha256"]:
                    raise UserError(
                        f"{file}: shard is missing or damaged (not the manifest's checksum); "
                        f"delete {file.parent} and {self.path / 'manifest.json'} to extract again"
                    )

    def reader(self, column: Column, rows: Dataset, kept: Dataset | None = None) -> Reader:
        """Rows of each example of the dataset the store was made from.

        `kept`: the same examples, some of them cut short; of these come the rows they still have.
        """
        stored = sum(entry["rows"] for entry in self._entries(column))
        counts = rows.positions(self.positions)
        if len(counts) != self.examples or counts.sum() != stored:
            raise UserError(
                f"{self.path}: column {column} has {stored} rows, the dataset "
                f"{counts.sum()} positions"
            )
        shards = [self._load(self.shard_path(column, s)) for s in range(self.num_shards)]
        return Reader(shards, counts, self.shard_examples, (kept or rows).positions(self.positions))

    def bytes(self, columns: Iterable[Column]) -> int:
        """Size on disk of the columns' shards."""
        return sum(
            self.shard_path(column, shard).stat().st_size
            for column in set(columns)
            for shard in range(self.num_shards)
        )

    def _entries(self, column: Column) -> list[dict[str, Any]]:
        if str(column) not in self.columns:
            held = ", ".join(sorted(self.columns)) or "nothing"
            raise UserError(
                f"{self.path}: no column {column} (layers from 0); the store holds {held}"
            )
        return self.columns[str(column)]

    def _load(self, file: Path) -> torch.Tensor:
        if file not in self._open:
            try:
                with safe_open(str(file), framework="pt") as handle:
                    self._open[file] = handle.get_tensor("rows")
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{file}: shard cannot be read ({error}); delete it to extract it again"
                ) from None
        return self._open[file]


class Reader:
    """Rows (positions, D) by example index, straight from the memory map."""

    def __init__(
        self,
        shards: list[torch.Tensor],
        counts: Integers,
        shard_examples: int,
        lengths: Integers | None = None,
    ) -> None:
        """counts: stored rows of each example; lengths: how many of them to hand out, from the
        first.
        """
        self._shards, self._shard_examples = shards, shard_examples
        starts = np.cumsum(counts) - counts
        self._starts = starts - np.repeat(starts[::shard_examples], shard_examples)[: len(starts)]
        self._lengths = counts if lengths is None else lengths

    def __getitem__(self, example: int) -> torch.Tensor:
        start = self._starts[example]
        return self._shards[example // self._shard_examples][start : start + self._lengths[example]]

    def __len__(self) -> int:
        return len(self._starts)
