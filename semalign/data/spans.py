"""The same examples in two tokenizers' ids, aligned where both cut the text (section 4.2).

A position is aligned where one of the other model's tokens ends at the same byte of the text: there
both states stand for the same beginning of it. Where the tokenizers are one that is everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from semalign.data.tokens import Aligned, Tokens, count_positions, tokenise
from semalign.errors import UserError
from semalign.models.vocabulary import Vocabulary
from semalign.tasks.task import Example

DROP, REFUSE = "drop", "refuse"  # alignment.unaligned


@dataclass(frozen=True)
class Side:
    """A model's tokenizer and what its tokens stand for."""

    tokenizer: Any
    vocabulary: Vocabulary


@dataclass(frozen=True, kw_only=True)
class Both:
    """Examples in the student's and in the teacher's ids, with as many aligned positions in each.

    `left_out` are the ids of examples that cannot be aligned.
    """

    student: list[Tokens]
    teacher: list[Tokens]
    left_out: list[str]

    def notes(self, name: str) -> list[str]:
        """What people are shown of two tokenizers that differ on these examples: nothing, or the
        rows left out and the share of the student's positions that are aligned.
        """
        if not self.left_out and all(row.aligned is None for row in self.student):
            return []
        kept = sum(count_positions(row.align_positions("all")) for row in self.student)
        total = sum(len(row.ids) for row in self.student)
        return [
            f"{name}: the tokenizers differ; {len(self.student)} rows are aligned, at "
            f"{kept / total:.1%} of the student's positions, {len(self.left_out)} left out"
        ]


def in_both(
    examples: Sequence[Example], student: Side, teacher: Side, *, max_length: int, unaligned: str
) -> Both:
    """The examples in both tokenizers' ids, each cut at `max_length` tokens, and aligned.

    Rows that cannot be aligned are left out with `unaligned="drop"`.

    **Raises** `UserError` for such a row with `refuse`, and in any case where no row is left.
    """
    rows = [
        tokenise(examples, side.tokenizer, max_length=max_length) for side in (student, teacher)
    ]
    both = Both(student=[], teacher=[], left_out=[])
    vocabularies = student.vocabulary, teacher.vocabulary
    for example, own, other in zip(examples, *rows, strict=True):
        found = align_tokens(own, other, *vocabularies, text=example.prompt + example.answer)
        if found is None:
            both.left_out.append(example.id)
        else:
            both.student.append(found[0])
            both.teacher.append(found[1])
    if both.left_out and (unaligned == REFUSE or not both.student):
        raise UserError(
            f"alignment.unaligned={unaligned}: {len(both.left_out)} of {len(examples)} rows, the "
            f"first of them {both.left_out[0]}, cannot be aligned: the tokenizers of student and "
            f"teacher read different texts; expected "
            + ("none (drop leaves them out)" if both.student else "rows that both read alike")
        )
    return both


def align_tokens(
    student: Tokens, teacher: Tokens, ours: Vocabulary, theirs: Vocabulary, *, text: str
) -> tuple[Tokens, Tokens] | None:
    """One example's ids with the positions at which tokens of both end at the same byte of `text`.

    BOS is aligned with BOS and EOS with EOS. Unchanged where that is every position of both. None
    where the two read different texts, have an id outside their vocabulary, or share no position
    that predicts the answer. Cost: linear in the length of the text.
    """
    spans = ours.spans(student.ids, text), theirs.spans(teacher.ids, text)
    if spans[0] is None or spans[1] is None:
        return None
    read = [b"".join(pieces) for pieces in spans if pieces is not None]
    if not (read[0].startswith(read[1]) or read[1].startswith(read[0])):  # one may be cut short
        return None
    places = {end: place for place, end in _ends(teacher.ids, spans[1], theirs)}
    pairs = [
        (place, places[end]) for place, end in _ends(student.ids, spans[0], ours) if end in places
    ]
    answer = range(len(student.ids))[student.answer_positions]
    answered = [pair for pair in pairs if pair[0] in answer]
    if not answered:
        return None
    same = len(pairs) == len(student.ids) == len(teacher.ids)
    if same and student.prompt_length == teacher.prompt_length:
        return student, teacher
    all_, of_answer = list(zip(*pairs, strict=True)), list(zip(*answered, strict=True))
    return (
        replace(student, aligned=Aligned(all_[0], of_answer[0])),
        replace(teacher, aligned=Aligned(all_[1], of_answer[1])),
    )


def _ends(
    ids: Sequence[int], pieces: Sequence[bytes], vocabulary: Vocabulary
) -> Iterator[tuple[int, int | str]]:
    """The places of tokens, each with where it ends in the text, in bytes; BOS and EOS by name."""
    ends = accumulate(len(piece) for piece in pieces)
    for place, (id_, piece, end) in enumerate(zip(ids, pieces, ends, strict=True)):
        if piece:
            yield place, end
        elif place == 0 and id_ == vocabulary.bos:
            yield place, "bos"
        elif place == len(ids) - 1 and id_ == vocabulary.eos:
            yield place, "eos"
