"""What a transfer starts from: configurations, tokens, vocabularies; no weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semalign.config.jobs import Config
from semalign.core.pairing import STRATEGIES, code_index
from semalign.data.labels import mislabel
from semalign.data.root import data_root
from semalign.data.tokens import Tokens, tokenise, translate
from semalign.errors import UserError, nearest
from semalign.models import published
from semalign.models.loading import load_config, load_tokenizer
from semalign.models.vocabulary import Overlap, vocabulary_overlap
from semalign.stages.scoring import chosen_protocol
from semalign.tasks import load_split


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Both models' configurations and the examples, as the student's and as the teacher's ids.

    `train` has all answers, whatever `data.labelled_limit`: what the models say of them is stored
    once for all settings of it.
    """

    teacher: Any
    student: Any
    overlap: Overlap
    train: list[Tokens]
    train_teacher: list[Tokens]
    attribution: list[Tokens]
    attribution_teacher: list[Tokens]
    extra_layers: tuple[int, ...]
    align: tuple[Tokens, ...] = ()  # LaTen's alignment split
    absent: tuple[str, ...] = ()  # models whose published shape stands in


def load_inputs(config: Config, *, planned: bool = False) -> Inputs:
    """Read and check everything that can be checked before weights are loaded.

    To plan, of the paper's models the published shape will do where they are not at hand.

    Raises UserError for missing models, data or splits, a vocabulary overlap below
    `alignment.min_overlap`, an unknown pairing strategy, and layers out of range.
    """
    models = config.teacher, config.student
    absent = tuple(path for path in models if planned and published.absent(path))
    teacher, student = (_configuration(config, path, absent) for path in models)
    check_layers(config, teacher.num_hidden_layers, student.num_hidden_layers)
    tokenizer, overlap = _vocabularies(config, teacher, student, absent)
    if overlap.fraction < config.alignment.min_overlap or not len(overlap.student_ids):
        raise UserError(
            f"alignment.min_overlap={config.alignment.min_overlap}: only {overlap.fraction:.1%} of "
            f"the tokens of {config.student} are in the vocabulary of {config.teacher}; expected "
            "models of one family"
        )
    root = data_root(config.data.root)
    data = config.data
    splits = {}
    for split in _splits(config):
        examples = load_split(root, data.task, split)
        if split == data.train_split:
            examples = mislabel(examples[: data.train_limit], data)
        splits[split] = tokenise(examples, tokenizer, max_length=data.max_length)
    chosen_protocol(config.evaluation)
    for split in config.evaluation.splits:
        for task in config.evaluation.tasks:
            load_split(data_root(config.evaluation.root or data.root), task, split)
    train, attribution = splits[data.train_split], splits[data.attribution_split]
    return Inputs(
        teacher=teacher,
        student=student,
        overlap=overlap,
        train=train,
        train_teacher=translate(train, overlap.student_to_teacher),
        attribution=attribution,
        attribution_teacher=translate(attribution, overlap.student_to_teacher),
        extra_layers=tuple(code_index(number) for number in config.extraction.layers),
        align=tuple(splits[config.laten.align_split]) if config.method == "laten" else (),
        absent=absent,
    )


def _configuration(config: Config, path: str, absent: Sequence[str]) -> Any:
    if path in absent:
        return published.published_config(path)
    return load_config(path, trust_remote_code=config.trust_remote_code).get_text_config()


def _vocabularies(
    config: Config, teacher: Any, student: Any, absent: Sequence[str]
) -> tuple[Any, Overlap]:
    """The student's tokenizer, and what its vocabulary shares with the teacher's."""
    if absent:
        return published.stand_in(teacher, student)
    tokenizers = [
        load_tokenizer(path, trust_remote_code=config.trust_remote_code)
        for path in (config.student, config.teacher)
    ]
    overlap = vocabulary_overlap(
        *tokenizers, student_rows=student.vocab_size, teacher_rows=teacher.vocab_size
    )
    return tokenizers[0], overlap


def _splits(config: Config) -> list[str]:
    """The splits that are read, each once."""
    data = config.data
    own = [config.laten.align_split] if config.method == "laten" else []
    return list(dict.fromkeys([data.train_split, data.attribution_split, *own]))


def check_layers(config: Config, teacher_layers: int, student_layers: int) -> None:
    """Raise UserError for an unknown pairing strategy and for layers that there are not."""
    pairing = config.pairing
    if pairing.strategy not in STRATEGIES:
        hint = nearest(pairing.strategy, STRATEGIES)
        raise UserError(f"pairing.strategy={pairing.strategy}: {hint}")
    if pairing.strategy == "explicit" and not pairing.explicit:
        raise UserError("pairing.explicit: the explicit strategy needs pairs, e.g. [[6, 4]]")
    for teacher, student in pairing.explicit or ():
        _in_range("pairing.explicit: teacher", teacher, teacher_layers)
        _in_range("pairing.explicit: student", student, student_layers)
    for number in config.extraction.layers:
        _in_range("extraction.layers: teacher", number, teacher_layers)
    if config.attribution.top_n > teacher_layers:
        raise UserError(
            f"attribution.top_n={config.attribution.top_n}: the teacher has {teacher_layers} layers"
        )


def _in_range(what: str, number: int, count: int) -> None:
    if not 1 <= number <= count:
        raise UserError(f"{what} layer {number} is out of range; expected 1..{count}")


def check_writable(folder: Path) -> None:
    """Make the work folder; UserError when it cannot be written."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"workdir={folder}: cannot be written ({error.strerror}); choose a folder you own"
        ) from None
