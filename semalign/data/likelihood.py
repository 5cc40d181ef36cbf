"""Texts whose log-probability is wanted: token ids, and where the scored ones begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from semalign.data.tokens import common_prefix
from semalign.errors import UserError

Span = tuple[tuple[int, ...], int]  # ids, and the index of the first that is scored, at least 1


class Windows(NamedTuple):
    """The spans of one text; `truncated`: the start of its context was cut off."""

    pieces: tuple[Span, ...]
    truncated: bool


@dataclass(frozen=True)
class Spans:
    """Makes spans of at most `room` ids. `special`: the tokenizer adds special tokens."""

    tokenizer: Any
    special: bool
    room: int

    def of(self, context: str, text: str) -> Windows:
        """The text after its context, in windows where it has none and is too long for one.

        As in lm_eval, whitespace at the end of the context is the text's, and a text without
        context comes after BOS, or EOS where there is no BOS. Every window but the first begins
        with one id of the one before.
        """
        kept = context.rstrip()
        if not kept:
            ids = [self._first(), *self._ids(context + text, special=False)]
            starts = range(0, len(ids) - 1, self.room - 1)
            return Windows(tuple((tuple(ids[at : at + self.room]), 1) for at in starts), False)
        before = self._ids(kept, special=self.special)
        ids = self._ids(context + text, special=self.special)
        shared = common_prefix(before, ids)
        start, over = max(1, min(shared, len(ids) - 1)), max(0, len(ids) - self.room)
        return Windows(((tuple(ids[over:]), max(1, start - over)),), over > 0)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _first(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        name = self.tokenizer.name_or_path
        raise UserError(f"{name}: tokenizer without BOS and EOS; set one of them")
