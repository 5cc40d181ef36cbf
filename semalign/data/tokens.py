"""Examples as token ids, with the positions each loss looks at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from semalign.data.chat import training_prompts
from semalign.errors import UserError
from semalign.tasks.task import Example


@dataclass(frozen=True)
class Tokens:
    """One supervised example.

    ids: prompt and answer, ending in EOS. prompt_length: how many of them are prompt, at least 1.
    Position t predicts token t + 1, so Eq. 4's set Omega is prompt_length - 1 .. len(ids) - 2. An
    example without a label is a prompt alone, and its Omega is empty.
    """

    id: str
    ids: tuple[int, ...]
    prompt_length: int

    def align_positions(self, positions: str) -> slice:
        """Where Eq. 3's mask m is 1: every token (`all`), or those that predict the answer
        (`answer`), which are Omega, and of a prompt alone its last token.
        """
        if positions == "all":
            return slice(0, len(self.ids))
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
    before, special = training_prompts(examples, tokenizer)
    whole = [prompt + e.answer for prompt, e in zip(before, examples, strict=True)]
    prompts = tokenizer(before, add_special_tokens=special)["input_ids"]
    texts = tokenizer(whole, add_special_tokens=special)["input_ids"]
    result = []
    for example, prompt, text in zip(examples, prompts, texts, strict=True):
        ids = text if text[-1] == eos else [*text, eos]
        prompt_length = max(1, common_prefix(prompt, ids))
        if prompt_length >= min(len(ids), max_length):
            raise UserError(
                f"data.max_length={max_length}: example {example.id} of {example.task} has a "
                f"prompt of {prompt_length} tokens and no answer token is left"
            )
        result.append(Tokens(example.id, tuple(ids[:max_length]), prompt_length))
    return result


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with together."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def translate_tokens(tokens: Sequence[Tokens], student_to_teacher: torch.Tensor) -> list[Tokens]:
    """The same sequences in the teacher's ids, token string by token string, so that position t
    means the same to both models.

    student_to_teacher: (student vocabulary,) with -1 where the teacher has no such token.
    Raises UserError naming the first example with a token that the teacher lacks.
    """
    table = student_to_teacher.tolist()
    result = []
    for example in tokens:
        ids = tuple(table[i] for i in example.ids)
        if -1 in ids:
            raise UserError(
                f"data: example {example.id} has student token {example.ids[ids.index(-1)]}, which "
                "the teacher's vocabulary lacks; expected tokens that both share"
            )
        result.append(Tokens(example.id, ids, example.prompt_length))
    return result


def fingerprint(tokens: Sequence[Tokens]) -> str:
    """Content hash of a tokenised dataset: order, ids and prompt lengths."""
    digest = hashlib.sha256()
    for example in tokens:
        digest.update(repr((example.ids, example.prompt_length)).encode())
    return digest.hexdigest()
