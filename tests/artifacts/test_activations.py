"""The activation store: what is in it, what is missing, what does not fit, what is damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from semalign.artifacts.activations import ActivationStore, Column
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens
from semalign.errors import UserError
from semalign.files import write_text

TOKENS = Dataset(Tokens(str(n), tuple(range(n)), 1) for n in (3, 5, 2, 4, 6))
IDENTITY = {"model": "m", "tokenizer": "t", "dataset": "d", "width": 4}
SHAPE: dict[str, Any] = {
    "examples": 5,
    "positions": "all",
    "dtype": "bfloat16",
    "shard_examples": 2,
}
COLUMN = Column(3, "mlp")


def open_store(path: Path, **changed: Any) -> ActivationStore:
    """The store of `IDENTITY`, with other fields where they are given."""
    identity = {name: changed.pop(name, value) for name, value in IDENTITY.items()}
    return ActivationStore(path, identity, **{**SHAPE, **changed})


def rows_of(shard: range, width: int = 4) -> torch.Tensor:
    """Row (example e, position t) is filled with 10 e + t: exact in bfloat16."""
    values = [10.0 * e + t for e in shard for t in range(len(TOKENS[e].ids))]
    return torch.tensor(values)[:, None].expand(-1, width)


def lengths_of(store: ActivationStore, shard: int) -> list[int]:
    return [len(TOKENS[e].ids) for e in store.shard_of(shard)]


def write(store: ActivationStore, column: Column, shard: int) -> None:
    lengths, rows = lengths_of(store, shard), rows_of(store.shard_of(shard)).to(torch.bfloat16)
    with store.writer([column], shard, lengths, width=4) as writer:
        writer.put(range(len(lengths)), [rows])


def filled(path: Path, columns: tuple[Column, ...] = (COLUMN,)) -> ActivationStore:
    store = open_store(path)
    for column in columns:
        for shard in range(store.num_shards):
            write(store, column, shard)
    store.commit(columns)
    return store


def test_rows_come_back_by_example(tmp_path: Path) -> None:
    filled(tmp_path)
    reader = open_store(tmp_path).reader(COLUMN, TOKENS)
    assert len(reader) == 5
    for e, example in enumerate(TOKENS):
        assert reader[e].dtype == torch.bfloat16
        assert reader[e][:, 0].tolist() == [10.0 * e + t for t in range(len(example.ids))]


def test_rows_of_examples_cut_short(tmp_path: Path) -> None:
    """Examples 0, 2 and 3 end earlier now; the rows of all stay where they are."""
    kept = [replace(t, ids=t.ids[:n]) for t, n in zip(TOKENS, (1, 5, 1, 2, 6), strict=True)]
    reader = filled(tmp_path).reader(COLUMN, TOKENS, Dataset(kept))
    for e, example in enumerate(kept):
        assert reader[e][:, 0].tolist() == [10.0 * e + t for t in range(len(example.ids))]


def test_reading_is_a_memory_map(tmp_path: Path) -> None:
    reader = filled(tmp_path).reader(COLUMN, TOKENS)
    path = str(tmp_path / "mlp.3")
    reader[0].sum()
    assert path in Path("/proc/self/maps").read_text()
    assert reader[0].untyped_storage().data_ptr() == reader[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_are_those_of_safetensors(tmp_path: Path, dtype: str) -> None:
    """Of two columns, whose rows come out of order; one example has none."""
    lengths, order, columns = [3, 0, 5, 2], ([3], [1, 2], [0]), [COLUMN, Column(1, "attn")]
    store = open_store(tmp_path / "store", dtype=dtype, shard_examples=4)
    rows = [torch.randn(sum(lengths), 7).to(getattr(torch, dtype)) for _ in columns]
    with store.writer(columns, 0, lengths, width=7) as writer:
        for examples in order:
            parts = [[r.split(lengths)[e] for e in examples] for r in rows]
            writer.put(examples, [torch.cat(part) for part in parts])
    for column, expected in zip(columns, rows, strict=True):
        save_file({"rows": expected}, tmp_path / "whole")
        assert store.shard_path(column, 0).read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_shard_without_rows_is_a_file(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    with store.writer([COLUMN], 0, [0, 0], width=4) as writer:
        writer.put([1, 0], [torch.zeros((0, 4), dtype=torch.bfloat16)])
    save_file({"rows": torch.zeros((0, 4), dtype=torch.bfloat16)}, tmp_path / "whole")
    assert store.shard_path(COLUMN, 0).read_bytes() == (tmp_path / "whole").read_bytes()


def test_an_error_while_rows_come_leaves_no_file(tmp_path: Path) -> None:
    store, columns = open_store(tmp_path), [COLUMN, Column(1, "attn")]
    rows = torch.zeros((3, 4), dtype=torch.bfloat16)
    with (
        pytest.raises(ZeroDivisionError),
        store.writer(columns, 0, lengths_of(store, 0), width=4) as writer,
    ):
        writer.put([0], [rows, rows])
        assert store.missing(columns).keys() == {0, 1, 2}
        _ = 1 / 0
    assert not [*tmp_path.rglob("*.safetensors*")]
    assert store.missing(columns)[0] == sorted(columns)


def test_only_missing_shards_and_columns_are_asked_for(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.missing([COLUMN]) == {0: [COLUMN], 1: [COLUMN], 2: [COLUMN]}
    write(store, COLUMN, 1)
    assert store.missing([COLUMN]) == {0: [COLUMN], 2: [COLUMN]}
    other = Column(1, "mlp")
    store = filled(tmp_path)
    assert store.missing([COLUMN, other]) == {0: [other], 1: [other], 2: [other]}


def test_a_column_counts_only_when_committed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, COLUMN, 0)
    with pytest.raises(UserError, match=r"no column mlp\.3 .*holds nothing"):
        store.reader(COLUMN, TOKENS)


def test_what_another_commits_meanwhile_stays(tmp_path: Path) -> None:
    mine, other = Column(1, "mlp"), Column(2, "mlp")
    store = filled(tmp_path)
    filled(tmp_path, (other,))
    filled(tmp_path, (mine,))
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    store.commit([COLUMN])  # nothing new
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    store.commit([mine])
    assert store.columns.keys() == {"mlp.1", "mlp.2", "mlp.3"}
    assert open_store(tmp_path).columns == store.columns


def test_a_text_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "report.md"
    write_text(file, "before")

    def fail(path: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match=r"report\.md: cannot be written \(Read-only"):
        write_text(file, "after")
    assert file.read_text() == "before"


@pytest.mark.parametrize("field", ["model", "tokenizer", "dtype", "dataset", "positions"])
def test_another_request_is_refused_with_the_difference(tmp_path: Path, field: str) -> None:
    filled(tmp_path)
    with pytest.raises(
        UserError, match=rf"does not fit the request \({field}: has .*, wanted zz\)"
    ):
        open_store(tmp_path, **{field: "zz"})


def test_a_store_keeps_the_size_of_its_shards(tmp_path: Path) -> None:
    """How it is cut is no part of what it holds."""
    filled(tmp_path)
    found = open_store(tmp_path, shard_examples=3)
    assert (found.shard_examples, found.num_shards) == (2, 3)
    assert found.missing([COLUMN]) == {}
    assert found.reader(COLUMN, TOKENS)[4][:, 0].tolist() == [40.0 + t for t in range(6)]


def test_damage_is_found(tmp_path: Path) -> None:
    filled(tmp_path)
    shard = tmp_path / "mlp.3" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"00001\.safetensors: shard is missing or damaged"):
        open_store(tmp_path).verify([COLUMN])


def test_a_cut_shard_is_one_line(tmp_path: Path) -> None:
    filled(tmp_path)
    shard = tmp_path / "mlp.3" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"00001\.safetensors: shard cannot be read"):
        open_store(tmp_path).reader(COLUMN, TOKENS)


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with pytest.raises(UserError, match=r"column mlp\.3 has 20 rows, the dataset 14 positions"):
        store.reader(COLUMN, Dataset(TOKENS[:4]))


def test_bytes_are_two_a_number(tmp_path: Path) -> None:
    store = filled(tmp_path)
    headers = 3 * 200
    assert 20 * 4 * 2 < store.bytes([COLUMN]) < 20 * 4 * 2 + headers
