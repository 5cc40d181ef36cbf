"""Judged records of one candidate on one split, as an artifact: what decides them, what they cost.

They are made batch by batch by engines and sandboxes (see engine/evaluation.py), in their folder.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from semalign.artifacts.artifact import Artifact, Cost, Json
from semalign.artifacts.host import Host
from semalign.artifacts.records import Journal, Record
from semalign.config.jobs import Config
from semalign.config.sections import Evaluation, Sandbox
from semalign.data.root import data_root, scored_examples
from semalign.files import content_key
from semalign.models.loading import load_tokenizer
from semalign.models.peft_folder import adapter_fingerprint
from semalign.models.reference import Model
from semalign.stages.scoring import (
    Generation,
    GenerationRequest,
    chosen_protocol,
    judge,
    requests,
)
from semalign.tasks import Example, find_task
from semalign.tasks.protocols import Protocol

logger = logging.getLogger(__name__)

_FILE = "records.parquet"

Served = tuple[str, str]  # a model's path, and the dtype that it is run in


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A model to score: a base model, or a base model with a LoRA adapter in PEFT's layout.

    The model's dtype is the one that it is run in.
    """

    name: str
    model: Model
    adapter: str | None = None

    @property
    def identity(self) -> Json:
        """Everything of it that decides its answers."""
        model = self.model
        served = {**model.identity, "tokens": model.tokens, "serving": model.serving}
        if self.adapter is None:
            return served
        return {**served, "adapter": adapter_fingerprint(self.adapter)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Records(Artifact):
    """What a candidate answered to the examples of a split, and the verdicts."""

    kind = "records"
    schema = 2  # how outputs ended, and the code in them
    folder = "records"
    stage = "evaluate"
    in_place = True

    candidate: Candidate
    task: str
    split: str
    examples: Sequence[Example]
    protocol: Protocol
    max_model_len: int
    min_tier: int

    @property
    def label(self) -> str:
        return f"{self.task}-{self.split}"

    def identity(self) -> Json:
        code = find_task(self.task).kind == "code"
        return {
            "candidate": self.candidate.identity,
            "examples": examples_key(self.examples),
            "split": self.split,
            "profile": self.protocol.label(self.task),
            "context_length": self.context_length,
            "min_tier": self.min_tier if code else None,
        }

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer: no more than the model has."""
        return min(self.max_model_len, int(self.candidate.model.config.max_position_embeddings))

    def requests(self) -> list[GenerationRequest]:
        """One of every example; raises UserError as `stages.scoring.requests` does."""
        tokenizer = _tokenizer(self.candidate.model)
        return requests(self.examples, tokenizer, self.protocol, max_model_len=self.context_length)

    def cost(self) -> Cost:
        """Prompts, and answers that are taken to be as long as the references; of the engine's
        memory the weights.
        """
        model = self.candidate.model
        tokenizer = _tokenizer(model)
        references = tokenizer([example.answer for example in self.examples])["input_ids"]
        tokens = sum(
            len(request.prompt_ids) + request.n * min(len(reference), request.max_tokens)
            for request, reference in zip(self.requests(), references, strict=True)
        )
        return Cost(operations=2.0 * model.shape.weights * tokens, memory=model.bytes)

    def file(self, folder: Path) -> Path:
        return folder / _FILE

    def is_made(self, folder: Path) -> bool:
        return self.file(folder).exists()

    def journal(self, folder: Path) -> Journal:
        """The records so far, to which judged batches are added."""
        return Journal(self.file(folder), [example.id for example in self.examples])

    def make(self, folder: Path, host: Host) -> Mapping[str, Json]:
        raise NotImplementedError("records are made by engines: see evaluate")


@dataclass(eq=False)
class Unit:
    """Records under way: their journal, and what is missing."""

    wanted: Records
    journal: Journal

    @functools.cached_property
    def missing(self) -> list[Example]:
        """The examples without records when the run began."""
        return [self.wanted.examples[index] for index in self.journal.missing()]


@dataclass(frozen=True, eq=False)
class EngineCall:
    """Some items of a unit, as requests of one engine call."""

    unit: Unit
    examples: list[Example]
    requests: list[GenerationRequest]


def batches(units: Sequence[Unit], size: int) -> list[EngineCall]:
    """All missing items of units of one model, code first: its verdicts take longest and can be
    reached while others run.
    """
    made = []
    for unit in sorted(units, key=lambda unit: find_task(unit.wanted.task).kind != "code"):
        wanted = unit.wanted
        tokenizer = _tokenizer(wanted.candidate.model)
        made_requests = requests(
            unit.missing, tokenizer, wanted.protocol, max_model_len=wanted.context_length
        )
        if truncated := sum(request.truncated for request in made_requests):
            logger.warning(
                "%s: the start of %d of %d prompts of %s %s was cut off to fit into %d tokens",
                *(wanted.candidate.name, truncated, len(made_requests), wanted.task, wanted.split),
                wanted.context_length,
            )
        for start in range(0, len(made_requests), size):
            part = slice(start, start + size)
            made.append(EngineCall(unit, unit.missing[part], made_requests[part]))
    return made


def _tokenizer(model: Model) -> Any:
    return load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)


def judge_batch(
    batch: EngineCall, generations: Sequence[Generation], sandbox: Sandbox
) -> list[Record]:
    """The records of a batch's answers; code runs in the sandbox."""
    wanted = batch.unit.wanted
    return judge(
        batch.examples,
        batch.requests,
        generations,
        split=wanted.split,
        protocol=wanted.protocol,
        sandbox=sandbox,
    )


def served(model: Model) -> Served:
    return model.path, model.dtype


def by_model(units: Sequence[Unit]) -> dict[Served, list[Unit]]:
    """Units whose base model is served by the same engines."""
    groups: dict[Served, list[Unit]] = {}
    for unit in units:
        groups.setdefault(served(unit.wanted.candidate.model), []).append(unit)
    return groups


def adapters_of(units: Sequence[Unit]) -> dict[str, tuple[str, str]]:
    """Folder and fingerprint of every adapter, by its path as given."""
    return {
        folder: (str(Path(folder).resolve()), adapter_fingerprint(folder))
        for unit in units
        if (folder := unit.wanted.candidate.adapter)
    }


def examples_key(examples: Sequence[Example]) -> str:
    """A hash of the rows as they are in the files."""
    return content_key([asdict(example) for example in examples])


def evaluated_content(config: Config) -> list[Any]:
    """What the evaluation settings of a transfer only name: rows and protocol, hashed."""
    settings, root = config.evaluation, data_root(config.evaluation.root or config.data.root)
    rows = [
        [task, split, examples_key(scored_examples(settings, root, task, split))]
        for task in settings.tasks
        for split in settings.splits
    ]
    protocol = chosen_protocol(settings)
    own = [protocol.label(task) for task in settings.tasks if task not in protocol.profiles]
    return [protocol.hash, rows, *([own] if own else [])]


def evaluated_items(settings: Evaluation, root: Path) -> int:
    """Requests that one candidate answers."""
    protocol = chosen_protocol(settings)
    profiles = {task: protocol.profile(task) for task in settings.tasks}
    return sum(
        len(scored_examples(settings, root, task, split)) * (1 if profile.choices else profile.n)
        for task, profile in profiles.items()
        for split in settings.splits
    )


def evaluation_cost(
    settings: Evaluation, *, answered: float, mean_length: float, largest: int
) -> Cost:
    """`answered`: requests times the weights of the model that answers, over all candidates;
    `largest`: bytes of one's weights. `mean_length` of the training rows stands for the answers'.
    """
    return Cost(
        operations=2.0 * answered * math.ceil(mean_length),
        memory=engine_bytes(largest, settings),
    )


def engine_bytes(weights: int, settings: Evaluation) -> int:
    """Of an engine's tensors: a model's weights and the key-value cache."""
    return weights + int(settings.kv_cache_gb * 2**30)
