"""Judged outputs: what one is, where they are kept, and the scores they add up to."""

from __future__ import annotations

import itertools
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from semalign.core.statistics import pass_at_k
from semalign.errors import UserError
from semalign.files import writing


@dataclass(frozen=True, kw_only=True)
class Record:
    """One judged output, under the evaluation profile that it names.

    ``group``: such as MMLU's subject. ``prompt_hash``: of the prompt's token ids, ``truncated``
    when its start did not fit, ``joined`` when they are no start of those of prompt and reference
    answer. ``tokens``: the generated ids, ``unfinished`` when their limit ended them; or
    ``choice_scores`` the log probability of each choice. ``extracted``: the answer in the output,
    such as its code; None when there is none. ``score``: of metrics that are not right or wrong; a
    log-probability is that of a byte, on average. ``metrics``: lm_eval's own of the item, as JSON.
    ``reason`` and ``tier``: the sandbox's. ``seconds``: of judging.
    """

    task: str
    split: str
    id: str
    sample: int
    group: str | None
    profile: str
    prompt_hash: str
    truncated: bool
    joined: bool
    output: str
    tokens: list[int]
    unfinished: bool
    choice_scores: list[float] | None
    extracted: str | None
    correct: bool
    reason: str
    tier: int | None
    seconds: float
    score: float | None = None
    metrics: str | None = None


_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("split", pa.string()),
        ("id", pa.string()),
        ("sample", pa.int32()),
        ("group", pa.string()),
        ("profile", pa.string()),
        ("prompt_hash", pa.string()),
        ("truncated", pa.bool_()),
        ("joined", pa.bool_()),
        ("output", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("unfinished", pa.bool_()),
        ("choice_scores", pa.list_(pa.float64())),
        ("extracted", pa.string()),
        ("correct", pa.bool_()),
        ("reason", pa.string()),
        ("tier", pa.int8()),
        ("seconds", pa.float64()),
        ("score", pa.float64()),
        ("metrics", pa.string()),
    ]
)


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write a Parquet file that is either whole or not there."""
    with writing(path) as partial:
        pq.write_table(
            pa.Table.from_pylist([asdict(record) for record in records], _SCHEMA), partial
        )


def read_records(path: Path) -> list[Record]:
    """The records of a file; UserError when it is no such file."""
    try:
        rows = pq.read_table(path).to_pylist()
        return [Record(**row) for row in rows]
    except (OSError, TypeError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a file of records ({reason}); delete it") from error


class Journal:
    """The records of one split while they are made: a Parquet file a judged batch, in the end one.

    A run that was killed leaves its batches; the next one finds them and requests the rest. Of two
    runs that answer the same items at the same time, the first to have them all makes the file.
    """

    def __init__(self, file: Path, ids: Iterable[str]) -> None:
        self.file = file
        self._order = {id: index for index, id in enumerate(ids)}
        self._parts = file.with_suffix(".parts")
        self._records: dict[str, list[Record]] = {}  # by item
        if not file.exists():
            for part in sorted(self._parts.glob("[0-9]*.parquet")):
                self._keep(_read_part(part))

    def missing(self) -> list[int]:
        """Indices of the items that have no records yet."""
        if self.file.exists():
            return []
        return [index for id, index in self._order.items() if id not in self._records]

    def add(self, records: Sequence[Record]) -> None:
        """Keep the records of some items; the last ones make the file whole."""
        if self.file.exists():  # another run was sooner
            return
        self._keep(records)
        self._write_part(records)
        if self._records.keys() >= self._order.keys() and not self.file.exists():
            rows = itertools.chain.from_iterable(self._records[id] for id in self._order)
            write_records(self.file, list(rows))
        if self.file.exists():
            shutil.rmtree(self._parts, ignore_errors=True)  # another run may remove it too
            self._records = {}

    def _keep(self, records: Iterable[Record]) -> None:
        """Of items that are new; those of an item are always together."""
        found: dict[str, list[Record]] = {}
        for record in records:
            found.setdefault(record.id, []).append(record)
        for id, samples in found.items():
            self._records.setdefault(id, sorted(samples, key=lambda record: record.sample))

    def _write_part(self, records: Sequence[Record]) -> None:
        name = f"{self._order[records[0].id]:06}-{uuid.uuid4().hex}.parquet"
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            write_records(self._parts / name, records)
        except FileNotFoundError:
            if not self.file.exists():  # else another run has ended, and removed the folder
                raise


def _read_part(part: Path) -> list[Record]:
    """None of a file that another run, which has ended, has removed."""
    try:
        return read_records(part)
    except UserError:
        if part.exists():
            raise
        return []


def item_scores(records: Iterable[Record], *, k: int = 1) -> dict[str, float]:
    """Each item's score, by id: right or wrong, pass@k by the unbiased estimator, or the record's
    own score where the metric has one.

    With one sample an item, accuracy and pass@1 are the same.
    """
    samples: dict[str, list[bool]] = {}
    scores: dict[str, float] = {}
    for record in records:
        samples.setdefault(record.id, []).append(record.correct)
        if record.score is not None:
            scores[record.id] = record.score
    return scores or {id: pass_at_k(len(right), sum(right), k) for id, right in samples.items()}


def shares(records: Sequence[Record]) -> dict[str, float]:
    """What limits a score, as shares of its outputs in [0, 1]: outputs without an answer, such as
    code, in them; outputs that the limit of tokens ended; prompts that were cut at their start; and
    prompts whose last token is another one when the reference answer follows.
    """
    found = {
        "no_answer": sum(record.extracted is None for record in records),
        "cut_answers": sum(record.unfinished for record in records),
        "cut_prompts": sum(record.truncated for record in records),
        "joined_prompts": sum(record.joined for record in records),
    }
    return {name: count / len(records) for name, count in found.items()}
