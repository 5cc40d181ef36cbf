"""Extraction by real actors: what is skipped, what is done again, what survives a kill -9."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from semalign.artifacts.activations import ActivationStore, Column
from semalign.artifacts.artifact import Workspace
from semalign.config.jobs import Config
from semalign.engine.executor import RayExecutor
from semalign.files import sha256
from semalign.methods.method import Transfer
from semalign.stages.extraction import Activations
from tests.engine.faults import kill, when

COLUMNS = [Column(1, "mlp"), Column(2, "mlp")]
SHARDS = 6  # 96 examples, 16 a shard


def wanted(config: Config, columns: Sequence[Column]) -> Activations:
    """The teacher's hidden states of the training rows."""
    inputs = Transfer.of(config).inputs
    return Activations(
        model=inputs.teacher,
        rows=inputs.train_teacher,
        columns=frozenset(columns),
        positions="all",
        dtype="bfloat16",
        extraction=config.extraction,
    )


def extract(config: Config, columns: Sequence[Column], work: Path) -> ActivationStore:
    """Make the columns on the cluster, or find them; returns their store, opened anew."""
    artifact = wanted(config, columns)
    with RayExecutor(config, Workspace(work)) as executor:
        return artifact.open(executor.make(artifact))


def digests(store: ActivationStore, columns: list[Column]) -> list[str]:
    return [sha256(store.shard_path(c, s)) for c in columns for s in range(store.num_shards)]


def times(store: ActivationStore) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in store.path.rglob("*.safetensors")}


def test_only_what_is_missing_is_computed(
    ray_cluster: None,
    configure: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, one_more = configure(), Column(0, "mlp")
    assert not (tmp_path / "activations").exists()
    store = extract(config, COLUMNS, tmp_path)
    assert set(store.columns) == {"mlp.1", "mlp.2"}
    assert "cached" not in capsys.readouterr().out
    before = times(store)
    assert len(before) == 2 * SHARDS

    store = extract(config, COLUMNS, tmp_path)
    assert "cached" in capsys.readouterr().out and times(store) == before
    assert store.missing([*COLUMNS, one_more]) == {shard: [one_more] for shard in range(SHARDS)}
    store = extract(config, [*COLUMNS, one_more], tmp_path)
    assert "cached" not in capsys.readouterr().out
    assert set(times(store)) - set(before) == {
        store.shard_path(one_more, shard) for shard in range(SHARDS)
    }

    lost = store.shard_path(one_more, 3)
    expected = sha256(lost)
    lost.unlink()
    (store.path / "manifest.json").unlink()  # as if interrupted before the commit
    store = wanted(config, COLUMNS).open(store.path)
    assert store.missing([*COLUMNS, one_more]) == {3: [one_more]}
    store = extract(config, [*COLUMNS, one_more], tmp_path)
    assert sha256(lost) == expected
    after = {f: f.stat().st_mtime_ns for f in before}
    assert after == before


def test_a_killed_actor_is_replaced_and_the_numbers_are_the_same(
    ray_cluster: None, configure: Callable[..., Config], tmp_path: Path
) -> None:
    slow = configure("extraction.batch_tokens=1")  # one example a batch
    expected = digests(extract(slow, COLUMNS, tmp_path / "undisturbed"), COLUMNS)

    killed = tmp_path / "killed"
    folder = Workspace(killed).place(wanted(slow, COLUMNS))
    first = folder / str(COLUMNS[0]) / "00000.safetensors"
    with when(first.exists, lambda: kill("ray::ModelWorker")):
        store = extract(slow, COLUMNS, killed)
    assert store.path == folder
    assert digests(store, COLUMNS) == expected
