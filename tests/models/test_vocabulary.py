"""What tokens stand for, and which of them two vocabularies share, by another way each."""

from __future__ import annotations

from typing import Any

import pytest

from semalign.models.loading import load_tokenizer
from semalign.models.vocabulary import Vocabulary, read_vocabulary, vocabulary_overlap
from tests.models.tokenizers_of import KINDS, TEXTS, tokenizer_of
from tests.reference import vocabulary as literal

LITERAL = {
    "byte-level": literal.byte_level,
    "sentencepiece": literal.sentencepiece,
    "unigram": literal.sentencepiece,
    "wordpiece": literal.wordpiece,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_ordinary_token_stands_for_its_bytes(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    found = read_vocabulary(tokenizer)
    added = tokenizer.added_tokens_decoder
    for token, id_ in tokenizer.get_vocab().items():
        byte = kind == "sentencepiece" and token.startswith("<0x")
        expected = token.encode() if id_ in added and not byte else LITERAL[kind](token)
        assert found.stands_for[id_] == expected or id_ in found.special


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "unigram"])
def test_the_tokens_of_a_text_add_up_to_it(kind: str, bos: bool) -> None:
    tokenizer = tokenizer_of(kind, bos=bos)
    vocabulary = read_vocabulary(tokenizer)
    texts = [TEXTS[0], TEXTS[2], " 17 left"]
    if kind != "unigram":  # which puts a space after an added token too
        texts += ["a<table>b"]
    if kind == "byte-level":
        texts += [*TEXTS, "\n\n a\t\U0001f9d1\u200d\U0001f33e", " \n"]
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        spans = vocabulary.spans(ids, text)
        assert spans is not None and b"".join(spans).decode() == text
        assert spans[-1] == b"" and (spans[0] == b"" or not bos)


def test_the_zoos_tokenizer_loses_nothing() -> None:
    tokenizer = load_tokenizer("zoo/student")
    vocabulary = read_vocabulary(tokenizer)
    for text in TEXTS[:1]:
        assert b"".join(vocabulary.spans(tokenizer(text)["input_ids"], text) or []) == text.encode()


def test_an_id_outside_the_vocabulary_has_no_spans() -> None:
    tokenizer = tokenizer_of("byte-level")
    assert read_vocabulary(tokenizer, rows=10).spans([3, 200], "x") is None


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_shared_tokens_equal_the_literal_ones(student: str, teacher: str) -> None:
    ours, theirs = tokenizer_of(student), tokenizer_of(teacher, 400)
    found = vocabulary_overlap(ours, theirs)
    pairs = list(zip(found.student_ids.tolist(), found.teacher_ids.tolist(), strict=True))
    sides = [read_vocabulary(tokenizer) for tokenizer in (ours, theirs)]
    for i, j in pairs:
        assert sides[0].stands_for[i] == sides[1].stands_for[j]
        assert (i in sides[0].special) == (j in sides[1].special)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    expected = literal.shared(*([*map(_meaning, [v] * n, range(n))] for v, n in _sized(sides)))
    assert len(pairs) == len(expected)  # of tokens with the same bytes, which pair is a convention
    unique = {i for i, _ in expected if _count(sides[0], i) == 1}
    assert {p for p in pairs if p[0] in unique} == {p for p in expected if p[0] in unique} or (
        "sentencepiece" in (student, teacher)
    )


def _sized(sides: list[Vocabulary]) -> list[tuple[Vocabulary, int]]:
    return [(side, max(side.strings) + 1) for side in sides]


def _meaning(side: Vocabulary, id_: int) -> bytes:
    special = b"special " if id_ in side.special else b""
    return special + side.stands_for[id_]


def _count(side: Vocabulary, id_: int) -> int:
    return [*side.stands_for.values()].count(side.stands_for[id_])


def test_strings_alone_match_falsely_and_too_little() -> None:
    """`é` is two bytes in one tokenizer's alphabet, and the letter itself in the other's."""
    ours, theirs = tokenizer_of("byte-level"), tokenizer_of("sentencepiece")
    strings = ours.get_vocab().keys() & theirs.get_vocab().keys()
    table = vocabulary_overlap(ours, theirs).student_to_teacher.tolist()
    false = [s for s in strings if table[ours.get_vocab()[s]] != theirs.get_vocab()[s]]
    assert "©" in false and "a" not in false  # the byte A9, and the character U+00A9
    assert sum(id_ >= 0 for id_ in table) > len(strings)


def test_a_letter_and_its_byte_token_are_not_mixed_up() -> None:
    ours, theirs = tokenizer_of("sentencepiece"), tokenizer_of("sentencepiece", 400)
    table = vocabulary_overlap(ours, theirs).student_to_teacher.tolist()
    for token in ("a", "<0x61>", "\n", "<0x0A>"):
        if token in ours.get_vocab() and token in theirs.get_vocab():
            assert table[ours.get_vocab()[token]] == theirs.get_vocab()[token]
    plain = vocabulary_overlap(tokenizer_of("byte-level"), theirs).student_to_teacher.tolist()
    assert plain[tokenizer_of("byte-level").get_vocab()["a"]] == theirs.get_vocab()["a"]


@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_the_ends_of_text_are_one_token(eos: str) -> None:
    ours, theirs = tokenizer_of("byte-level", eos=eos), tokenizer_of("unigram")
    table = vocabulary_overlap(ours, theirs).student_to_teacher.tolist()
    # `</s>` is a token of both, by its string; <|im_end|> is none of the teacher's
    assert table[ours.convert_tokens_to_ids("</s>")] == theirs.eos_token_id
    assert table[ours.eos_token_id] == (theirs.eos_token_id if eos == "</s>" else -1)


def test_one_vocabulary_with_itself_is_the_identity() -> None:
    tokenizers: list[Any] = [load_tokenizer("zoo/student"), *map(tokenizer_of, KINDS)]
    for tokenizer in tokenizers:
        found = vocabulary_overlap(tokenizer, tokenizer)
        assert found.student_ids.tolist() == found.teacher_ids.tolist()
        assert found.fraction == found.fraction_of_smaller == 1
        assert len(found.student_ids) == len(tokenizer)
