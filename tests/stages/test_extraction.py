"""What is stored is what the whole model says, whatever the batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from semalign.artifacts.activations import ActivationStore, Column
from semalign.artifacts.shards import ShardWriter
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens
from semalign.errors import UserError
from semalign.models.decoder import capture, find_decoder, run_base
from semalign.models.heads import read_lm_head
from semalign.models.loading import load_model
from semalign.stages.extraction import extract_shard
from semalign.stages.supervision import Head, final_column


def store_of(path: Path, tokens: list[Tokens], positions: str) -> ActivationStore:
    return ActivationStore(
        path,
        {"model": "m"},
        examples=len(tokens),
        positions=positions,
        dtype="float32",
        shard_examples=4,
    )


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_stored_rows_equal_one_by_one(
    family: dict[str, Path], tokens: list[Tokens], tmp_path: Path, positions: str
) -> None:
    columns = [Column(1, "mlp"), Column(2, "attn"), Column(2, "input")]
    store = store_of(tmp_path, tokens, positions)
    cut = load_model(family["teacher"], dtype="float32", num_layers=3)
    for shard, wanted in store.missing(columns).items():
        members = [tokens[e] for e in store.shard_of(shard)]
        rows = extract_shard(cut, store, shard, wanted, members, batch_tokens=300)
        assert rows == sum(len(range(len(m.ids))[m.align_positions(positions)]) for m in members)
    store.commit(columns)
    whole = find_decoder(load_model(family["teacher"], dtype="float32"))
    wanted = [(c.layer, c.interface) for c in columns]
    for e, example in enumerate(tokens):
        ids = torch.tensor([example.ids])
        with torch.no_grad(), capture(whole, wanted) as seen:
            run_base(whole, ids, torch.ones_like(ids))
        for column in columns:
            expected = seen[column.layer, column.interface][0, example.align_positions(positions)]
            torch.testing.assert_close(store.reader(column, Dataset(tokens))[e], expected)


def test_logits_come_back_from_the_stored_final_states(
    family: dict[str, Path], tokens: list[Tokens], tmp_path: Path
) -> None:
    column = final_column(5)
    store = store_of(tmp_path, tokens, "answer")
    teacher = load_model(family["teacher"], dtype="float32")
    for shard in store.missing([column]):
        members = [tokens[e] for e in store.shard_of(shard)]
        extract_shard(teacher, store, shard, [column], members, batch_tokens=300)
    store.commit([column])
    head = Head(read_lm_head(str(family["teacher"])), None)
    reader = store.reader(column, Dataset(tokens))
    for e, example in enumerate(tokens):
        with torch.no_grad():
            scores = teacher(torch.tensor([example.ids])).logits[0]
        expected = scores[example.supervised_positions]
        torch.testing.assert_close(head.logits(reader[e]), expected, rtol=1e-4, atol=1e-5)


def test_only_the_last_layer_has_final_states(family: dict[str, Path]) -> None:
    decoder = find_decoder(load_model(family["teacher"], dtype="float32", num_layers=3))
    with (
        pytest.raises(UserError, match=r"layer 2 .*only the last of the 3 layers"),
        capture(decoder, [(1, "final")]),
    ):
        pass


def test_the_input_of_a_layer_runs_no_layer_above(
    family: dict[str, Path], tokens: list[Tokens], tmp_path: Path
) -> None:
    model = load_model(family["teacher"], dtype="float32", num_layers=3)
    ran: list[int] = []
    for index, layer in enumerate(find_decoder(model).layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    for layer in (2, 0):
        ran.clear()
        store = store_of(tmp_path / str(layer), tokens, "all")
        extract_shard(model, store, 0, [Column(layer, "input")], tokens[:4], batch_tokens=10_000)
        assert ran == list(range(layer))


def test_an_error_between_batches_leaves_no_file(
    family: dict[str, Path], tokens: list[Tokens], tmp_path: Path
) -> None:
    """One in a pass, and one of the thread that writes."""
    model = load_model(family["teacher"], dtype="float32", num_layers=3)
    columns = [Column(1, "mlp"), Column(2, "attn")]
    passes: list[int] = []

    def fail(*_: object) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt

    handle = find_decoder(model).layers[1].register_forward_hook(fail)
    store = store_of(tmp_path / "pass", tokens, "all")
    with pytest.raises(KeyboardInterrupt):
        extract_shard(model, store, 0, columns, tokens[:4], batch_tokens=1)
    handle.remove()
    assert len(passes) == 3 and not [*store.path.rglob("*.safetensors*")]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = store_of(tmp_path / "thread", tokens, "all")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(ShardWriter, "put", full)
        extract_shard(model, store, 0, columns, tokens[:4], batch_tokens=1)
    assert not [*store.path.rglob("*.safetensors*")]


def test_bytes_do_not_depend_on_the_batches_order_in_the_file(
    family: dict[str, Path], tokens: list[Tokens], tmp_path: Path
) -> None:
    """A batch of one example at a time, from short to long, against all rows saved at once."""
    model = load_model(family["teacher"], dtype="float32", num_layers=3)
    decoder, columns = find_decoder(model), [Column(2, "mlp"), Column(0, "input")]
    store = store_of(tmp_path, tokens, "all")
    members = sorted(tokens[:4], key=lambda e: -len(e.ids))
    extract_shard(model, store, 0, columns, members, batch_tokens=1)
    wanted = [(c.layer, c.interface) for c in columns]
    for key, column in zip(wanted, columns, strict=True):
        rows = []
        for example in members:
            ids = torch.tensor([example.ids])
            with torch.no_grad(), capture(decoder, wanted) as seen:
                run_base(decoder, ids, torch.ones_like(ids))
            rows.append(seen[key][0])
        save_file({"rows": torch.cat(rows)}, tmp_path / "whole")
        assert store.shard_path(column, 0).read_bytes() == (tmp_path / "whole").read_bytes()
