"""Which tokens two vocabularies share, and which positions of two tokenisations are one, pair by
pair.

Literal: every token is compared with every other, every beginning of a text with every other.
"""

from __future__ import annotations

from collections.abc import Sequence

GPT2_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]


def byte_level(token: str) -> bytes:
    """GPT-2's alphabet: a printable byte is itself, the n-th other one is 256 + n."""
    others = [byte for byte in range(256) if byte not in GPT2_PRINTED]
    return bytes(
        ord(letter) if ord(letter) in GPT2_PRINTED else others[ord(letter) - 256]
        for letter in token
    )


def sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


def wordpiece(token: str) -> bytes:
    return token[2:].encode() if token.startswith("##") else b" " + token.encode()


def shared(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[tuple[int, int]]:
    """Pairs of ids of the same bytes: each student id with the first that is left, by id."""
    pairs: list[tuple[int, int]] = []
    for i, ours in enumerate(student):
        for j, theirs in enumerate(teacher):
            if ours == theirs and j not in [taken for _, taken in pairs]:
                pairs.append((i, j))
                break
    return pairs


def aligned(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[tuple[int, int]]:
    """Positions after which the pieces of both have added up to the same text."""
    return [
        (i, j)
        for i in range(len(student))
        for j in range(len(teacher))
        if b"".join(student[: i + 1]) == b"".join(teacher[: j + 1])
    ]
