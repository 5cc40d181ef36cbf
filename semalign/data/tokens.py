"""Examples as token ids, with the positions each loss looks at."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from semalign.data.chat import training_prompts
from semalign.errors import UserError
from semalign.tasks.task import Example

logger = logging.getLogger(__name__)


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


# How a line of code after a prompt may begin.
_CONTINUATIONS = ("x", "    x")


def prompt_ids(
    prompts: Sequence[str], tokenizer: Any, *, strip: bool = True, special: bool = True
) -> list[list[int]]:
    """The ids of each prompt, for training and for evaluation; an answer's ids come after them.

    With ``strip``, whitespace at the end of a prompt is left to its answer where the tokenizer
    would join it with what follows: GPT-2's kind has one token for a newline and the indentation
    after it, and an answer that begins in the middle of a token is unlike all the model has seen.
    ``special``: with a BOS where the tokenizer adds one, and without an EOS that it adds.
    """
    if not prompts:
        return []
    found = _encode(prompts, tokenizer, special)
    loose = [i for i, prompt in enumerate(prompts) if strip and prompt != prompt.rstrip()]
    stripped = _encode([prompts[i].rstrip() for i in loose], tokenizer, special)
    continued = [
        _encode([prompts[i] + line for i in loose], tokenizer, special) for line in _CONTINUATIONS
    ]
    for place, (i, shorter) in enumerate(zip(loose, stripped, strict=True)):
        if not all(starts(texts[place], found[i]) for texts in continued):
            found[i] = shorter
    return found


def _encode(texts: Sequence[str], tokenizer: Any, special: bool = True) -> list[list[int]]:
    """Ids; with ``special`` a BOS where the tokenizer adds one, never a second, and no EOS."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=special)["input_ids"]
    if not special:
        return found
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [ids[ids[:2] == [bos, bos] : len(ids) - (ids[1:][-1:] == [eos])] for ids in found]


def starts(ids: Sequence[int], prompt: Sequence[int]) -> bool:
    """Whether a text's ids begin with those of its prompt."""
    return list(ids[: len(prompt)]) == list(prompt)


def tokenise(examples: Sequence[Example], tokenizer: Any, *, max_length: int) -> list[Tokens]:
    """Prompt and answer tokenised together; the answer starts where the prompt's ids end.

    Where a tokenizer joins a prompt's end with its answer's start, the answer begins before that
    token; the number of such examples is logged. Cut at `max_length` tokens. Raises UserError when
    an example has no supervised token left, and when the tokenizer has no EOS token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(f"{tokenizer.name_or_path}: tokenizer without an EOS token; set eos_token")
    if not examples:
        return []
    before, special = training_prompts(examples, tokenizer)
    whole = [prompt + e.answer for prompt, e in zip(before, examples, strict=True)]
    prompts = prompt_ids(before, tokenizer, special=special)
    texts = _encode(whole, tokenizer, special)
    warn_joined(examples, prompts, texts)
    result = []
    for example, prompt, text in zip(examples, prompts, texts, strict=True):
        ids = [*text, eos]
        prompt_length = max(1, common_prefix(prompt, ids))
        if prompt_length >= min(len(ids), max_length):
            raise UserError(
                f"data.max_length={max_length}: example {example.id} of {example.task} has a "
                f"prompt of {prompt_length} tokens and no answer token is left"
            )
        result.append(Tokens(example.id, tuple(ids[:max_length]), prompt_length))
    return result


def warn_joined(
    examples: Sequence[Example], prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> None:
    """Log how many prompts' ids are no start of the ids of prompt and answer."""
    joined = [
        example.id
        for example, prompt, text in zip(examples, prompts, texts, strict=True)
        if not starts(text, prompt)
    ]
    if joined:
        logger.warning(
            "the tokenizer joins the end of %d of %d prompts of %s with the answer, first %s",
            *(len(joined), len(examples), examples[0].task, joined[0]),
        )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with together."""
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
