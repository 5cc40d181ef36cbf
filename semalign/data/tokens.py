"""Examples as token ids, with the positions each loss looks at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from semalign.errors import UserError
from semalign.tasks.task import Example


@dataclass(frozen=True)
class Aligned:
    """Positions of one example, ascending: `all` that are aligned, and those of them that predict
    the `answer`.
    """

    all: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """One supervised example.

    ids: prompt and answer, ending in EOS. prompt_length: how many of them are prompt, at least 1.
    Position t predicts token t + 1, so Eq. 4's set Omega is prompt_length - 1 .. len(ids) - 2. An
    example without a label is a prompt alone, and its Omega is empty. aligned: the positions that
    another tokenizer's ids of the same text have too; None where that is every position.
    """

    id: str
    ids: tuple[int, ...]
    prompt_length: int
    aligned: Aligned | None = None

    def align_positions(self, positions: str) -> slice | list[int]:
        """Where Eq. 3's mask m is 1: every token (`all`), or those that predict the answer
        (`answer`), which are Omega, and of a prompt alone its last token; of these the aligned.
        """
        if self.aligned is not None:
            return [p for p in getattr(self.aligned, positions) if p < len(self.ids)]
        return slice(0, len(self.ids)) if positions == "all" else self.answer_positions

    @property
    def answer_positions(self) -> slice:
        """Those that predict the answer, aligned or not; of a prompt alone its last one."""
        return slice(self.prompt_length - 1, max(self.prompt_length, len(self.ids) - 1))

    @property
    def labelled(self) -> bool:
        return len(self.ids) > self.prompt_length

    @property
    def supervised_positions(self) -> slice:
        return slice(self.prompt_length - 1, len(self.ids) - 1)


def tokenise(examples: Sequence[Example], tokenizer, *, max_length: int) -> list[Tokens]:  # type: ignore[no-untyped-def]
    """Prompt and answer tokenised together; the answer starts where that differs from the prompt.

    Cut at `max_length` tokens. Raises UserError when an example has no supervised token left, and
    when the tokenizer has no EOS token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(f"{tokenizer.name_or_path}: tokenizer without an EOS token; set eos_token")
    if not examples:
        return []
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    texts = tokenizer([example.prompt + example.answer for example in examples])["input_ids"]
    result = []
    for example, prompt, text in zip(examples, prompts, texts, strict=True):
        ids = text if text[-1] == eos else [*text, eos]
        prompt_length = max(1, _common_prefix(prompt, ids))
        if prompt_length >= min(len(ids), max_length):
            raise UserError(
                f"data.max_length={max_length}: example {example.id} of {example.task} has a "
                f"prompt of {prompt_length} tokens and no answer token is left"
            )
        result.append(Tokens(example.id, tuple(ids[:max_length]), prompt_length))
    return result


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def count_positions(where: slice | list[int]) -> int:
    """How many positions a slice or a list has."""
    return int(where.stop - where.start) if isinstance(where, slice) else len(where)


def fingerprint(tokens: Sequence[Tokens]) -> str:
    """Content hash of a tokenised dataset: order, ids, prompt lengths and aligned positions."""
    digest = hashlib.sha256()
    for example in tokens:
        digest.update(repr((example.ids, example.prompt_length)).encode())
        if example.aligned is not None:
            digest.update(repr((example.aligned.all, example.aligned.answer)).encode())
    return digest.hexdigest()
