"""The tokens that two vocabularies share."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """The tokens two vocabularies share, matched by token string.

    `student_ids[i]` and `teacher_ids[i]` (LongTensors, by ascending student id) are one token.
    `student_to_teacher` (LongTensor of the student's vocabulary size) is -1 where the teacher has
    no such token. `fraction` is the share of the student's vocabulary that the teacher has.
    """

    student_ids: torch.Tensor
    teacher_ids: torch.Tensor
    fraction: float
    student_to_teacher: torch.Tensor

    @functools.cached_property
    def key(self) -> str:
        """A hash of the pairs of ids."""
        pairs = torch.stack([self.student_ids, self.teacher_ids]).numpy()
        return hashlib.sha256(pairs.tobytes()).hexdigest()[:16]


def vocabulary_overlap(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    student_rows: int | None = None,
    teacher_rows: int | None = None,
) -> Overlap:
    """The overlap of two vocabularies by token string, special and added tokens included.

    **Arguments**: `student_rows`, `teacher_rows` are the LM heads' numbers of rows. A token without
    a row has no semantic basis and is left out.
    """
    student = _tokens(student_tokenizer, student_rows)
    teacher = _tokens(teacher_tokenizer, teacher_rows)
    pairs = sorted((id_, teacher[token]) for token, id_ in student.items() if token in teacher)
    student_ids = torch.tensor([pair[0] for pair in pairs], dtype=torch.long)
    teacher_ids = torch.tensor([pair[1] for pair in pairs], dtype=torch.long)
    size = student_rows if student_rows is not None else max(student.values(), default=-1) + 1
    student_to_teacher = torch.full((size,), -1, dtype=torch.long)
    student_to_teacher[student_ids] = teacher_ids
    return Overlap(
        student_ids=student_ids,
        teacher_ids=teacher_ids,
        fraction=len(pairs) / max(1, len(student)),
        student_to_teacher=student_to_teacher,
    )


def shared_rows(student_rows: int, teacher_rows: int) -> Overlap:
    """The overlap of two vocabularies with the same ids, of which one may have more."""
    shared = min(student_rows, teacher_rows)
    table = torch.full((student_rows,), -1, dtype=torch.long)
    table[:shared] = torch.arange(shared)
    return Overlap(
        student_ids=torch.arange(shared),
        teacher_ids=torch.arange(shared),
        fraction=shared / student_rows,
        student_to_teacher=table,
    )


def _tokens(tokenizer: Any, rows: int | None) -> dict[str, int]:
    vocabulary = tokenizer.get_vocab()
    return {token: id_ for token, id_ in vocabulary.items() if rows is None or id_ < rows}
