"""Extraction by real actors: what is skipped, what is done again, what survives a kill -9."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from semalign.engine.extraction import ActorShape, extract
from semalign.engine.steps import Steps
from semalign.stages.inputs import load_inputs

from semalign.artifacts.activations import ActivationStore, Column
from semalign.config.jobs import Config
from semalign.data.tokens import Tokens
from semalign.files import sha256
from tests.engine.faults import kill, when

COLUMNS = [Column(1, "mlp"), Column(2, "mlp")]


@pytest.fixture
def steps(ray_cluster: None, configure: Callable[..., Config]) -> Steps:
    config = configure()
    return Steps(config, load_inputs(config))


def begin(steps: Steps, folder: Path) -> tuple[ActivationStore, list[Tokens]]:
    tokens = steps.inputs.train_teacher
    identity = steps.identity("teacher", tokens, "all", "bfloat16", 48)
    return ActivationStore(folder, identity), tokens


def digests(store: ActivationStore, columns: list[Column]) -> list[str]:
    return [sha256(store.shard_path(c, s)) for c in columns for s in range(store.num_shards)]


def test_only_what_is_missing_is_computed(steps: Steps, tmp_path: Path) -> None:
    store, tokens = begin(steps, tmp_path / "store")
    shape = ActorShape()
    assert extract(steps.teacher, tokens, store, COLUMNS, shape) == COLUMNS
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "store").rglob("*.safetensors")}
    assert len(before) == 2 * 6

    store, _ = begin(steps, tmp_path / "store")
    assert extract(steps.teacher, tokens, store, COLUMNS, shape) == []
    one_more = Column(0, "mlp")
    assert extract(steps.teacher, tokens, store, [*COLUMNS, one_more], shape) == [one_more]

    lost = store.shard_path(one_more, 3)
    expected = sha256(lost)
    lost.unlink()
    (tmp_path / "store" / "manifest.json").unlink()  # as if interrupted before the commit
    store, _ = begin(steps, tmp_path / "store")
    assert store.missing([*COLUMNS, one_more]) == {3: [one_more]}
    extract(steps.teacher, tokens, store, [*COLUMNS, one_more], shape)
    assert sha256(lost) == expected
    after = {f: f.stat().st_mtime_ns for f in before}
    assert after == before


def test_a_killed_actor_is_replaced_and_the_numbers_are_the_same(
    steps: Steps, tmp_path: Path
) -> None:
    slow = ActorShape(batch_tokens=1)  # one example a batch
    store, tokens = begin(steps, tmp_path / "undisturbed")
    extract(steps.teacher, tokens, store, COLUMNS, slow)
    expected = digests(store, COLUMNS)

    store, _ = begin(steps, tmp_path / "killed")
    with when(store.shard_path(COLUMNS[0], 0).exists, lambda: kill("ray::MapWorker")):
        extract(steps.teacher, tokens, store, COLUMNS, slow)
    assert digests(store, COLUMNS) == expected
