"""What a transfer starts from: models by reference, examples as token ids; no weight is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from semalign.config.jobs import Config
from semalign.config.sections import Alignment
from semalign.core.pairing import STRATEGIES
from semalign.data.dataset import Dataset
from semalign.data.labels import mislabel
from semalign.data.root import check_splits, data_root
from semalign.data.spans import Side, in_both
from semalign.errors import UserError
from semalign.models import published
from semalign.models.heads import find_lm_head
from semalign.models.loading import load_tokenizer
from semalign.models.reference import Model
from semalign.models.support import check_supported
from semalign.models.vocabulary import Overlap, read_vocabulary, shared_tokens
from semalign.stages.questions import check_questions
from semalign.stages.references import check_references
from semalign.tasks import TASKS, Example, load_split


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Both models, the tokens that they share, and the examples in both models' ids.

    `train` has all answers, whatever `data.labelled_limit`: what the models compute on them is
    stored once for all settings of it. `align` is LaTen's alignment split.
    """

    teacher: Model
    student: Model
    shared: Overlap
    train: Dataset
    train_teacher: Dataset
    attribution: Dataset
    attribution_teacher: Dataset
    align: Dataset

    @property
    def absent(self) -> tuple[str, ...]:
        """Models whose published shape stands in for them."""
        return tuple(model.path for model in (self.teacher, self.student) if model.absent)


def load_inputs(
    config: Config,
    *,
    trained: Sequence[str] = (),
    align_split: str | None = None,
    planned: bool = False,
) -> Inputs:
    """Read and check everything that can be checked before weights are loaded.

    `trained` are the splits that the method trains on, by default the training split; `align_split`
    is read too where a method needs it. To plan, of the paper's models the published
    shape will do where they are absent.

    Raises UserError for missing models, data, splits or LM heads, models that are not supported
    (`Model.open`, `check_supported`), a vocabulary overlap below `alignment.min_overlap`, an
    unknown task or pairing strategy, layers out of range, rows that are both trained on and
    reported, and rows whose own reference answer fails their tests.
    """
    teacher, student = _models(config, planned=True)
    for model in (teacher, student):
        check_supported(model)
    check_layers(config, teacher.layers, student.layers)
    ours, theirs, shared = _vocabularies(teacher, student)
    check_overlap(shared, config.alignment, config.student, config.teacher)
    root, data = data_root(config.data.root), config.data
    TASKS.find(data.task, "data.task")
    splits = {}
    names = dict.fromkeys([data.train_split, data.attribution_split, *filter(None, [align_split])])
    pairs = itertools.product(config.evaluation.tasks, config.evaluation.splits)
    reported = data_root(config.evaluation.root or data.root)
    for task in config.evaluation.tasks:
        TASKS.find(task, "evaluation.tasks")
    check_splits(
        [
            *((root, data.task, split) for split in names),
            *((reported, task, split) for task, split in pairs),
        ]
    )
    for split in names:
        examples = load_split(root, data.task, split)
        if split == data.train_split:
            examples = mislabel(examples[: data.train_limit], data)
        both = in_both(
            examples,
            ours,
            theirs,
            max_length=data.max_length,
            unaligned=config.alignment.unaligned,
        )
        splits[split] = Dataset(both.student), Dataset(both.teacher)
        for note in both.notes(f"{data.task}/{split}"):
            print(f"[data] {note}")
    check_questions((teacher, student), config.evaluation, reported)
    _check_held_out(config, trained or (data.train_split,))
    check_references(config.evaluation, reported, config.work)
    if not planned:  # last, for all weights are read to hash them
        for model in (teacher, student):
            find_lm_head(model.path, trust_remote_code=config.trust_remote_code)
        teacher, student = _models(config, planned=False)
    train, attribution = splits[data.train_split], splits[data.attribution_split]
    return Inputs(
        teacher=teacher,
        student=student,
        shared=shared,
        train=train[0],
        train_teacher=train[1],
        attribution=attribution[0],
        attribution_teacher=attribution[1],
        align=splits[align_split][0] if align_split else Dataset([]),
    )


def _check_held_out(config: Config, trained: Sequence[str]) -> None:
    """Raise UserError when a split that is trained on is reported, whole or in part.

    Rows are compared by their prompts; `data.shared_with` names reported splits that may share
    some, and then their number is printed.
    """
    data, evaluation = config.data, config.evaluation
    roots = data_root(data.root), data_root(evaluation.root or data.root)
    prompts: dict[str, str] = {}
    for split in trained:
        limit = data.train_limit if split == data.train_split else None
        rows = load_split(roots[0], data.task, split)[:limit]
        prompts |= dict.fromkeys(map(_question, rows), split)
    for task, split in itertools.product(evaluation.tasks, evaluation.splits):
        examples = load_split(roots[1], task, split)
        if task != data.task:
            continue
        if split in trained and roots[0] == roots[1]:
            raise UserError(
                f"evaluation.splits: {split} of {task} is trained on; expected held-out splits, "
                "such as dev and test"
            )
        shared = [prompts[_question(row)] for row in examples if _question(row) in prompts]
        if shared and split not in data.shared_with:
            raise UserError(
                f"data.train_split={data.train_split}: {len(shared)} of {len(examples)} rows of "
                f"{task}/{split}, which is reported, are also in {shared[0]}; expected none "
                f"(data.shared_with=[{split}] allows them)"
            )
        if shared:
            print(f"[data] {len(shared)} of {len(examples)} rows of {task}/{split} are trained on")


def _question(example: Example) -> str:
    """What tells an example from others: its prompt, or the text of a corpus."""
    return example.prompt or example.answer


def _models(config: Config, *, planned: bool) -> tuple[Model, Model]:
    """Teacher and student."""
    teacher, student = (
        Model.open(
            path,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            cache=config.work / "fingerprints",
            planned=planned,
        )
        for path in (config.teacher, config.student)
    )
    return teacher, student


def _vocabularies(teacher: Model, student: Model) -> tuple[Side, Side, Overlap]:
    """The student's and the teacher's tokenizer, and the tokens that they share."""
    if teacher.absent or student.absent:
        tokenizer, shared = published.stand_in(teacher.config, student.config)
        side = Side(tokenizer, read_vocabulary(tokenizer))
        return side, side, shared
    return sides(student, teacher)


def sides(student: Model, teacher: Model) -> tuple[Side, Side, Overlap]:
    """Both models' tokenizers, the student's first, and the tokens that they share."""
    ours, theirs = (
        Side(tokenizer, read_vocabulary(tokenizer, rows=model.config.vocab_size))
        for model in (student, teacher)
        for tokenizer in [load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)]
    )
    rows = student.config.vocab_size
    return ours, theirs, shared_tokens(ours.vocabulary, theirs.vocabulary, student_rows=rows)


def check_overlap(shared: Overlap, alignment: Alignment, student: str, teacher: str) -> None:
    """Raise UserError where the two vocabularies share less than `alignment.min_overlap`."""
    if shared.fraction_of_smaller < alignment.min_overlap or not len(shared.student_ids):
        raise UserError(
            f"alignment.min_overlap={alignment.min_overlap}: only {shared.fraction_of_smaller:.1%} "
            f"of the tokens of the smaller vocabulary are in the other one, of {student} and "
            f"{teacher}"
        )


def check_layers(config: Config, teacher_layers: int, student_layers: int) -> None:
    """Raise UserError for an unknown pairing strategy and for layers that do not exist."""
    pairing = config.pairing
    strategy = STRATEGIES.find(pairing.strategy, "pairing.strategy")
    if "explicit" in strategy.looks_at and not pairing.explicit:
        raise UserError(
            f"pairing.explicit: the {pairing.strategy} strategy needs pairs, e.g. [[6, 4]]"
        )
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


def labelled(config: Config, rows: Sequence[Any]) -> int | None:
    """How many of the rows have labels, from the first; None: all."""
    limit = config.data.labelled_limit
    return limit if limit is not None and limit < len(rows) else None
