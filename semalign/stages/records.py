"""Judged outputs: what one is, where they are kept, and the scores they add up to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from semalign.errors import UserError
from semalign.tasks import TASKS, Example
from semalign.tasks.scores import Score, pass_at_k, score

PROFILE = "zero-shot-1"  # prompts, decoding and extraction as in semalign/tasks; part of every key


@dataclass(frozen=True, kw_only=True)
class Record:
    """One judged output. ``tokens`` are the generated ids; ``reason``, ``tier`` the sandbox's."""

    task: str
    split: str
    id: str
    sample: int
    prompt_hash: str
    output: str
    tokens: list[int]
    extracted: str | None
    correct: bool
    reason: str
    tier: int | None
    seconds: float


_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("split", pa.string()),
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("prompt_hash", pa.string()),
        ("output", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("extracted", pa.string()),
        ("correct", pa.bool_()),
        ("reason", pa.string()),
        ("tier", pa.int8()),
        ("seconds", pa.float64()),
    ]
)


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write a Parquet file that is either whole or not there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.Table.from_pylist([asdict(record) for record in records], _SCHEMA), beside)
    beside.replace(path)


def read_records(path: Path) -> list[Record]:
    """The records of a file; UserError when it is no such file."""
    try:
        rows = pq.read_table(path).to_pylist()
        return [Record(**row) for row in rows]
    except (OSError, TypeError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a file of records ({reason}); delete it") from error


def summarise(records: Iterable[Record], *, k: int = 1) -> dict[tuple[str, str], Score]:
    """The score of every (task, split): accuracy, or pass@k by the unbiased estimator.

    With one sample an item, accuracy and pass@1 are the same mean.
    """
    passes: dict[tuple[str, str], dict[str, list[bool]]] = {}
    for record in records:
        items = passes.setdefault((record.task, record.split), {})
        items.setdefault(record.id, []).append(record.correct)
    return {
        key: score([pass_at_k(len(samples), sum(samples), k) for samples in items.values()])
        for key, items in passes.items()
    }


def content_key(examples: Sequence[Example], split: str, **how: Any) -> str:
    """SHA-256 of everything that decides the records of one split: items, profile, ``how``.

    ``how`` is the caller's: model and adapter fingerprints, dtype, limits, all JSON values.
    """
    names = sorted({example.task for example in examples})
    profile = [(name, TASKS[name].stop, TASKS[name].max_tokens) for name in names]
    content = [PROFILE, profile, split, how, [asdict(example) for example in examples]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def adapter_fingerprint(folder: str) -> str:
    """SHA-256 of a LoRA adapter's weights and of its configuration, but for where its base lies."""
    config = _adapter_config(folder)
    config.pop("base_model_name_or_path", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update((Path(folder) / "adapter_model.safetensors").read_bytes())
    return digest.hexdigest()


def adapter_rank(folder: str) -> int:
    """The rank an engine must make room for."""
    config = _adapter_config(folder)
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def _adapter_config(folder: str) -> dict[str, Any]:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise UserError(f"adapter {folder}: no {name}; expected a folder in PEFT's layout")
    config: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text())
    if config.get("use_dora") or config.get("modules_to_save"):
        raise UserError(f"adapter {folder}: vLLM serves neither DoRA nor modules_to_save; merge it")
    return config
