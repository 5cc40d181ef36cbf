"""Ray Data actors that hold a model and fill an activation store with what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from semalign.artifacts.activations import ActivationStore, Column, Identity
from semalign.data.tokens import Tokens
from semalign.errors import UserError
from semalign.stages.job import ModelSpec


@dataclass(frozen=True, kw_only=True)
class ActorShape:
    """How many actors hold the model, and what each may use."""

    num_actors: int = 1
    num_cpus: float = 1
    num_gpus: float = 0
    device_map: str | None = None
    max_restarts: int = 2
    batch_tokens: int = 4096


class Extractor:
    """Holds the model up to the deepest layer asked for; one call writes one shard."""

    def __init__(
        self,
        model: ModelSpec,
        shape: ActorShape,
        store: tuple[str, Identity],
        columns: dict[int, list[Column]],
        tokens_ref: Any,
    ) -> None:
        import torch

        from semalign.models.loading import load_model

        torch.set_num_threads(max(1, int(shape.num_cpus)))
        deepest = max(column.layer for wanted in columns.values() for column in wanted)
        self.model = load_model(
            model.path,
            dtype=model.dtype,
            device="cuda" if shape.num_gpus and shape.device_map is None else None,
            device_map=shape.device_map,
            num_layers=deepest + 1,
            trust_remote_code=model.trust_remote_code,
        )
        self.store = ActivationStore(Path(store[0]), store[1])
        self.columns = columns
        self.tokens: Sequence[Tokens] = ray.get(tokens_ref[0])
        self.batch_tokens = shape.batch_tokens

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from semalign.stages.extraction import extract_shard

        rows = [
            extract_shard(
                self.model,
                self.store,
                shard,
                self.columns[shard],
                [self.tokens[example] for example in self.store.shard_of(shard)],
                batch_tokens=self.batch_tokens,
            )
            for shard in batch["shard"].tolist()
        ]
        return {"shard": batch["shard"], "rows": rows}


def extract(
    model: ModelSpec,
    tokens: Sequence[Tokens],
    store: ActivationStore,
    columns: Sequence[Column],
    shape: ActorShape,
) -> list[Column]:
    """Fill the store with `columns`; returns those that had to be computed.

    Columns already in the manifest are verified against their checksums and left alone; of the
    others only missing shards are computed. An actor that dies is replaced `max_restarts` times.
    """
    held = [column for column in columns if str(column) in store.columns]
    store.verify(held)
    todo = store.missing(columns)
    if todo:
        _run_actors(model, tokens, store, todo, shape)
    store.commit(columns)
    return sorted(set(columns) - set(held))


def _run_actors(
    model: ModelSpec,
    tokens: Sequence[Tokens],
    store: ActivationStore,
    todo: dict[int, list[Column]],
    shape: ActorShape,
) -> None:
    # Ray Data's own default is to restart for ever, also after a crash that comes back each time
    restarts = {"max_restarts": shape.max_restarts, "max_task_retries": shape.max_restarts}
    # max_errored_blocks stays 0: a shard that cannot be computed stops the run
    pool = ray.data.ActorPoolStrategy(size=min(shape.num_actors, len(todo)))
    # in a list: Ray resolves bare references among constructor arguments, nested ones are passed on
    tokens_ref = [ray.put(list(tokens))]
    items = [{"shard": shard} for shard in sorted(todo)]
    written = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            Extractor,
            fn_constructor_args=(model, shape, (str(store.path), store.identity), todo, tokens_ref),
            batch_size=1,
            compute=pool,
            num_cpus=shape.num_cpus,
            num_gpus=shape.num_gpus,
            ray_remote_args_fn=lambda: restarts,
        )
        .take_all()
    )
    lost = sorted(set(todo) - {int(row["shard"]) for row in written})
    if lost:
        raise UserError(f"{store.path}: shards {lost} were not written; run the same command again")
