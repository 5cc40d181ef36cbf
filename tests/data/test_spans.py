"""One text in two tokenizers' ids: which positions are one, which rows cannot be aligned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from semalign.data.dataset import Dataset
from semalign.data.labels import hide_labels
from semalign.data.spans import Side, align_tokens, in_both
from semalign.data.tokens import Tokens, tokenise
from semalign.errors import UserError
from semalign.models.loading import load_tokenizer
from semalign.models.vocabulary import read_vocabulary
from semalign.tasks.task import Example
from tests.models.tokenizers_of import tokenizer_of
from tests.reference import vocabulary as literal

ROWS = [
    Example(id=str(n), task="gsm8k", prompt=prompt, answer=answer, row={})
    for n, (prompt, answer) in enumerate(
        [
            ("Question: Natalia sold clips to 48 friends.\nAnswer:", " 48/2 = 24\n#### 24"),
            ("How many, then? It isn't 1,000.\n", "17 left.\n    hello there"),
            ("hello hello hello", " hello"),
            ("there", "\n\n\n  "),
        ]
    )
]


def side(tokenizer: Any) -> Side:
    return Side(tokenizer, read_vocabulary(tokenizer))


def both(student: Side, teacher: Side, **settings: Any) -> Any:
    return in_both(ROWS, student, teacher, **{"max_length": 512, "unaligned": "drop"} | settings)


def positions(row: Tokens, name: str = "all") -> list[int]:
    where = row.align_positions(name)
    return list(range(len(row.ids))[where]) if isinstance(where, slice) else where


@pytest.mark.parametrize("bos", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    "kinds", [("byte-level", "sentencepiece"), ("sentencepiece", "unigram"), ("unigram",) * 2]
)
def test_aligned_positions_equal_the_literal_ones(
    kinds: tuple[str, str], bos: tuple[bool, bool]
) -> None:
    sides = [
        side(tokenizer_of(kind, size, bos=b))
        for kind, size, b in zip(kinds, (320, 420), bos, strict=True)
    ]
    found = both(*sides)
    assert len(found.student) + len(found.left_out) == len(ROWS) and len(found.student) >= 2
    texts = {row.id: row.prompt + row.answer for row in ROWS}
    for ours, theirs in zip(found.student, found.teacher, strict=True):
        pieces = [
            _marked(s.vocabulary.spans(row.ids, texts[row.id]) or [], with_bos)
            for s, row, with_bos in zip(sides, (ours, theirs), bos, strict=True)
        ]
        skip = [int(bos[0] and not bos[1]), int(bos[1] and not bos[0])]  # a BOS of one alone
        cut = [p[n:] for p, n in zip(pieces, skip, strict=True)]
        expected = [
            (i + skip[0], j + skip[1]) for i, j in literal.aligned(*cut) if cut[0][i] and cut[1][j]
        ]
        assert list(zip(positions(ours), positions(theirs), strict=True)) == expected
        answer = positions(replace(ours, aligned=None), "answer")
        assert list(zip(positions(ours, "answer"), positions(theirs, "answer"), strict=True)) == [
            pair for pair in expected if pair[0] in answer
        ]


def _marked(pieces: list[bytes], bos: bool) -> list[bytes]:
    """BOS and EOS as letters of the text; a space before the text stands for nothing."""
    return [b"<" if bos else pieces[0], *pieces[1:-1], b">"]


def test_the_state_at_an_aligned_position_has_read_the_same_text() -> None:
    ours, theirs = side(tokenizer_of("byte-level")), side(tokenizer_of("sentencepiece", bos=True))
    found = both(ours, theirs)
    for row, other in zip(found.student, found.teacher, strict=True):
        for i, j in zip(positions(row), positions(other), strict=True):
            texts = [
                s.tokenizer.decode(ids[: at + 1], skip_special_tokens=True)
                for s, ids, at in ((ours, row.ids, i), (theirs, other.ids, j))
            ]
            assert texts[0] == texts[1]


def test_one_tokenizer_is_aligned_everywhere_as_before() -> None:
    tokenizer = load_tokenizer("zoo/student")
    found = both(side(tokenizer), side(load_tokenizer("zoo/teacher")))
    plain = tokenise(ROWS, tokenizer, max_length=512)
    assert found.student == found.teacher == plain and found.left_out == []
    assert found.notes("x") == []
    assert Dataset(found.student).key == Dataset(plain).key
    rows = Dataset(found.student)
    assert rows.whole is rows


def test_a_cut_row_is_aligned_as_far_as_both_go() -> None:
    sides = side(tokenizer_of("byte-level")), side(tokenizer_of("sentencepiece"))
    [ours, theirs] = (
        both(*sides, max_length=45).student[0],
        both(*sides, max_length=45).teacher[0],
    )
    assert 0 < len(positions(ours)) < 45 and max(positions(theirs)) < 45


def test_a_hidden_label_hides_its_aligned_positions() -> None:
    sides = side(tokenizer_of("byte-level")), side(tokenizer_of("sentencepiece"))
    found = both(*sides)
    [row, *_] = hide_labels(Dataset(found.student), 0)
    assert max(positions(row)) < row.prompt_length
    first = positions(found.student[0], "answer")[:1]
    assert positions(row, "answer") == [p for p in first if p < row.prompt_length]


def test_rows_that_the_two_read_differently_are_left_out() -> None:
    """Unigram has no bytes: a letter it does not know is <unk>."""
    rows = [*ROWS[:1], replace(ROWS[0], id="strange", answer=" ж")]
    sides = side(tokenizer_of("byte-level")), side(tokenizer_of("unigram"))
    found = in_both(rows, *sides, max_length=512, unaligned="drop")
    assert found.left_out == ["strange"] and [row.id for row in found.student] == ["0"]
    [note] = found.notes("gsm8k/train")
    assert note.startswith("gsm8k/train: the tokenizers differ; 1 rows are aligned, at ")
    assert note.endswith("% of the student's positions, 1 left out")
    with pytest.raises(UserError, match=r"alignment\.unaligned=refuse: 1 of 2 rows.*strange"):
        in_both(rows, *sides, max_length=512, unaligned="refuse")
    with pytest.raises(UserError, match=r"alignment\.unaligned=drop: 1 of 1 rows.*strange"):
        in_both(rows[1:], *sides, max_length=512, unaligned="drop")


def test_a_special_token_within_a_text_is_read_by_its_string() -> None:
    row = replace(ROWS[0], prompt="<|im_end|>" + ROWS[0].prompt)
    sides = side(tokenizer_of("byte-level", eos="<|im_end|>")), side(tokenizer_of("byte-level"))
    found = in_both([row], *sides, max_length=512, unaligned="refuse")
    assert len(found.student) == 1


def test_an_id_without_a_row_cannot_be_aligned() -> None:
    tokenizer = tokenizer_of("byte-level")
    [row, *_] = tokenise(ROWS, tokenizer, max_length=512)
    whole, part = read_vocabulary(tokenizer), read_vocabulary(tokenizer, rows=5)
    text = ROWS[0].prompt + ROWS[0].answer
    assert align_tokens(row, row, whole, part, text=text) is None
    assert align_tokens(row, row, whole, whole, text=text) == (row, row)


def test_aligned_positions_change_the_key_and_whole_takes_them_away() -> None:
    sides = side(tokenizer_of("byte-level")), side(tokenizer_of("sentencepiece"))
    found = Dataset(both(*sides).student)
    plain = Dataset([replace(row, aligned=None) for row in found])
    assert found.key != plain.key == found.whole.key
    kept, every = found.positions("all"), found.whole.positions("all")
    assert (kept <= every).all() and (kept < every).any()
