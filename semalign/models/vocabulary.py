"""What the tokens of a vocabulary stand for, and the tokens that two vocabularies share."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # sentencepiece's


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """What each token of a tokenizer stands for.

    `strings[id]` is a token's string, `stands_for[id]` the bytes of text that it stands for: of a
    special token those of its string. `special` are the ids of special tokens; `bos` and `eos`
    are ids, or None.
    """

    strings: Mapping[int, str]
    stands_for: Mapping[int, bytes]
    special: frozenset[int]
    bos: int | None
    eos: int | None

    def spans(self, ids: Sequence[int], text: str) -> list[bytes] | None:
        """The piece of `text` that each id stands for: joined they are the text, or its beginning.

        A BOS at the beginning and an EOS at the end stand for nothing, and a space that the
        tokenizer puts before the text is left out. None where an id is not in the vocabulary.
        """
        pieces = []
        for place, id_ in enumerate(ids):
            outside = (place == 0 and id_ == self.bos) or (
                place == len(ids) - 1 and id_ == self.eos
            )
            piece = b"" if outside else self.stands_for.get(id_)
            if piece is None:
                return None
            pieces.append(piece)
        first = next((place for place, piece in enumerate(pieces) if piece), None)
        if first is not None and pieces[first].startswith(b" ") and not text.startswith(" "):
            pieces[first] = pieces[first][1:]
        return pieces


def read_vocabulary(tokenizer: Any, *, rows: int | None = None) -> Vocabulary:
    """What the tokens of a tokenizer stand for, by the way it writes bytes in their strings.

    GPT-2's alphabet of bytes, sentencepiece's U+2581 and `<0x0A>`, WordPiece's continuing prefix;
    any other string stands for itself.

    **Arguments**: `rows` is the LM head's number of rows; a token without one is left out.
    """
    strings = {
        id_: token for token, id_ in tokenizer.get_vocab().items() if rows is None or id_ < rows
    }
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {id_ for id_, token in added.items() if token.special} | {*tokenizer.all_special_ids}
    read, reads_added = _reading(tokenizer)
    literal = special if reads_added else special | set(added)
    return Vocabulary(
        strings=strings,
        stands_for={
            id_: token.encode() if id_ in literal else read(token) for id_, token in strings.items()
        },
        special=frozenset(special),
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
    )


def _reading(tokenizer: Any) -> tuple[Callable[[str], bytes], bool]:
    """How a token's string is read, and whether that goes for added tokens too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # sentencepiece behind Python code
        return _of_sentencepiece, True
    if type(backend.model).__name__ == "WordPiece":
        return functools.partial(
            _of_wordpiece, prefix=backend.model.continuing_subword_prefix
        ), False
    parts = (backend.decoder, backend.pre_tokenizer, backend.normalizer)
    written = [json.loads(part.__getstate__()) for part in parts if part is not None]
    described = json.dumps(written, ensure_ascii=False)
    if '"ByteLevel"' in described:
        return _of_byte_level, False
    if _SPACE in described:
        return _of_sentencepiece, True
    return str.encode, True


def _of_byte_level(token: str) -> bytes:
    table = _byte_of_letter()
    if all(letter in table for letter in token):
        return bytes(table[letter] for letter in token)
    return token.encode()


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def _of_sentencepiece(token: str) -> bytes:
    if found := _BYTE.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace(_SPACE, " ").encode()


def _of_wordpiece(token: str, prefix: str) -> bytes:
    if token.startswith(prefix):
        return token[len(prefix) :].encode()
    return f" {token}".encode()


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """The tokens two vocabularies share, matched by what they stand for.

    `student_ids[i]` and `teacher_ids[i]` (LongTensors, by ascending student id) are one token.
    `student_to_teacher` (LongTensor of the student's vocabulary size) is -1 where the teacher has
    no such token. `fraction` is the share of the student's vocabulary that the teacher has,
    `fraction_of_smaller` the share of the smaller of the two vocabularies that the other one has.
    """

    student_ids: torch.Tensor
    teacher_ids: torch.Tensor
    fraction: float
    fraction_of_smaller: float
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
    """The overlap of two vocabularies, as in `shared_tokens`.

    **Arguments**: `student_rows`, `teacher_rows` are the LM heads' numbers of rows. A token without
    a row has no semantic basis and is left out.
    """
    return shared_tokens(
        read_vocabulary(student_tokenizer, rows=student_rows),
        read_vocabulary(teacher_tokenizer, rows=teacher_rows),
        student_rows=student_rows,
    )


def shared_tokens(
    student: Vocabulary, teacher: Vocabulary, *, student_rows: int | None = None
) -> Overlap:
    """The tokens of two vocabularies that stand for the same, each in one pair at most.

    Special tokens are matched by their strings, others by their bytes. Where several tokens of a
    vocabulary stand for the same bytes (`A` and `<0x41>`), those of equal strings are paired
    first, and then by ascending id, byte tokens last. The two EOS are one token where neither
    vocabulary has the other's string.
    """
    ours, theirs = _by_meaning(student), _by_meaning(teacher)
    pairs = []
    for meaning in ours.keys() & theirs.keys():
        left, right = ours[meaning], theirs[meaning]
        same = [(left[string], right[string]) for string in left.keys() & right.keys()]
        rest = (
            [side[string] for string in side if string not in other]
            for side, other in ((left, right), (right, left))
        )
        pairs += [*same, *zip(*rest, strict=False)]
    pairs = sorted([*pairs, *_ends(student, teacher)])
    size = student_rows if student_rows is not None else max(student.strings, default=-1) + 1
    table = torch.full((size,), -1, dtype=torch.long)
    student_ids, teacher_ids = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T.contiguous()
    table[student_ids] = teacher_ids
    return Overlap(
        student_ids=student_ids,
        teacher_ids=teacher_ids,
        fraction=len(pairs) / max(1, len(student.strings)),
        fraction_of_smaller=len(pairs) / max(1, min(len(student.strings), len(teacher.strings))),
        student_to_teacher=table,
    )


def _by_meaning(vocabulary: Vocabulary) -> dict[tuple[bool, bytes], dict[str, int]]:
    """(special or not, bytes) -> the tokens that stand for it, string -> id, byte tokens last."""
    found: dict[tuple[bool, bytes], dict[str, int]] = defaultdict(dict)
    order = sorted(
        vocabulary.strings, key=lambda i: (bool(_BYTE.fullmatch(vocabulary.strings[i])), i)
    )
    for id_ in order:
        meaning = (id_ in vocabulary.special, vocabulary.stands_for[id_])
        found[meaning][vocabulary.strings[id_]] = id_
    return found


def _ends(student: Vocabulary, teacher: Vocabulary) -> list[tuple[int, int]]:
    """The two EOS, where neither vocabulary has the other's string."""
    if student.eos is None or teacher.eos is None:
        return []
    ours, theirs = student.strings.get(student.eos), teacher.strings.get(teacher.eos)
    if ours in {None, *teacher.strings.values()} or theirs in {None, *student.strings.values()}:
        return []
    return [(student.eos, teacher.eos)]


def shared_rows(student_rows: int, teacher_rows: int) -> Overlap:
    """The overlap of two vocabularies with the same ids, of which one may have more."""
    shared = min(student_rows, teacher_rows)
    table = torch.full((student_rows,), -1, dtype=torch.long)
    table[:shared] = torch.arange(shared)
    return Overlap(
        student_ids=torch.arange(shared),
        teacher_ids=torch.arange(shared),
        fraction=shared / student_rows,
        fraction_of_smaller=1.0,
        student_to_teacher=table,
    )
