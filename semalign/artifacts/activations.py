"""The activation store: what a model said at given positions, on disk, read by memory map.

    <store>/identity.json           what the activations are of; written first
    <store>/mlp.3/00000.safetensors rows (positions, D) of one shard; layer 3 counts from 0
    <store>/manifest.json           columns, shards, row counts, checksums; written last

A column is one (interface, layer). Shards are written beside and renamed, so a shard that exists is
whole; the manifest lists a column once all of its shards are there. Reading is zero-copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from semalign.artifacts.files import _beside, _read_json, content_key, sha256, write_json
from semalign.data.tokens import Tokens
from semalign.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, order=True)
class Column:
    """A layer (0-based) and what is captured there: `input`, `attn`, `mlp`, `block` or `final`."""

    layer: int
    interface: str

    def __str__(self) -> str:
        return f"{self.interface}.{self.layer}"


@dataclass(frozen=True)
class Identity:
    """What two stores must share to hold the same numbers."""

    model: str
    tokenizer: str
    dataset: str
    examples: int
    positions: str
    dtype: str
    compute_dtype: str
    width: int
    shard_examples: int

    @property
    def key(self) -> str:
        return content_key(asdict(self))


class ActivationStore:
    """Open or begin a store at `path` for `identity`.

    Raises UserError when the folder holds something else, saying which fields differ.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path = path
        self.identity = identity
        self.num_shards = -(-identity.examples // identity.shard_examples)
        self._open: dict[Path, torch.Tensor] = {}
        found = _read_json(path / "identity.json")
        if found is None:
            write_json(path / "identity.json", asdict(identity))
        elif found != asdict(identity):
            wanted = asdict(identity)
            names = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
            both = [(n, str(found.get(n))[:12], str(wanted.get(n))[:12]) for n in names]
            what = "; ".join(f"{name}: has {has}, wanted {want}" for name, has, want in both)
            raise UserError(f"{path}: this store does not fit the request ({what})")
        self.columns = self._read_columns()

    def _read_columns(self) -> dict[str, list[dict[str, Any]]]:
        return dict((_read_json(self.path / "manifest.json") or {"columns": {}})["columns"])

    def shard_path(self, column: Column, shard: int) -> Path:
        return self.path / str(column) / f"{shard:05d}.safetensors"

    def shard_of(self, shard: int) -> range:
        """Example indices of a shard."""
        size = self.identity.shard_examples
        return range(shard * size, min((shard + 1) * size, self.identity.examples))

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

    def write(self, column: Column, shard: int, rows: torch.Tensor) -> None:
        """Write rows (positions, D), beside and renamed."""
        target = self.shard_path(column, shard)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(target)
        tensor = rows.to(DTYPES[self.identity.dtype]).contiguous().cpu()
        save_file({"rows": tensor}, str(beside))
        beside.replace(target)

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
        with FileLock(self.path / ".manifest.lock"):
            self.columns = self._read_columns() | new
            manifest = {
                "layer_numbers": "from 0",
                "identity": asdict(self.identity),
                "columns": self.columns,
            }
            write_json(self.path / "manifest.json", manifest)

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

    def reader(
        self, column: Column, tokens: Sequence[Tokens], kept: Sequence[Tokens] | None = None
    ) -> Reader:
        """Rows of each example of the dataset the store was made from.

        `kept`: the same examples, some of them cut short; of these come the rows they still have.
        """
        rows = [entry["rows"] for entry in self._entries(column)]
        counts = [_count(example, self.identity.positions) for example in tokens]
        if len(counts) != self.identity.examples or sum(counts) != sum(rows):
            raise UserError(
                f"{self.path}: column {column} has {sum(rows)} rows, the dataset "
                f"{sum(counts)} positions"
            )
        shards = [self._load(self.shard_path(column, s)) for s in range(self.num_shards)]
        lengths = [_count(example, self.identity.positions) for example in kept or tokens]
        return Reader(shards, counts, self.identity.shard_examples, lengths)

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
        counts: list[int],
        shard_examples: int,
        lengths: list[int] | None = None,
    ) -> None:
        """counts: stored rows of each example; lengths: how many of them to hand out, from the
        first.
        """
        self._shards = shards
        self._where: list[tuple[int, int, int]] = []
        start = 0
        for index, (count, length) in enumerate(zip(counts, lengths or counts, strict=True)):
            start = 0 if index % shard_examples == 0 else start
            self._where.append((index // shard_examples, start, start + length))
            start += count

    def __getitem__(self, example: int) -> torch.Tensor:
        shard, start, stop = self._where[example]
        return self._shards[shard][start:stop]

    def __len__(self) -> int:
        return len(self._where)


def _count(example: Tokens, positions: str) -> int:
    where = example.align_positions(positions)
    return int(where.stop - where.start)
