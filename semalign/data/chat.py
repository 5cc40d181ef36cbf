"""Chats as text, by the chat template of a tokenizer."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from semalign.errors import UserError, one_line
from semalign.tasks import Example, find_task

BY_PROTOCOL = "which this protocol wants; choose one without, such as protocol=paper"
BY_ROWS = "which rows of messages need; expected a model that is tuned to chat"

_DAY = datetime.date(2024, 7, 26)  # that of Llama's own templates where there is no clock


def chat_text(turns: Sequence[Mapping[str, str]], tokenizer: Any, *, wanted: str) -> str:
    """The turns as the tokenizer's chat template renders them, up to where the next answer begins.

    It holds the special tokens. A template that writes the date writes the same one in every run,
    as records of an earlier day are found again. Raises UserError for a tokenizer without a
    template, which is `wanted` for a reason, and for one that cannot be rendered.
    """
    name = getattr(tokenizer, "name_or_path", "")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer {name} has no chat template, {wanted}")
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, strftime_now=_DAY.strftime
            )
        )
    except Exception as error:  # a template is a program, and raises what it likes
        raise UserError(
            f"the chat template of the tokenizer {name} cannot be rendered "
            f"({type(error).__name__}: {one_line(error, limit=200)}); mend it, or choose a "
            "protocol without, such as protocol=paper"
        ) from error


def training_prompts(examples: Sequence[Example], tokenizer: Any) -> tuple[list[str], bool]:
    """The prompts of examples of one task, and whether the tokenizer adds the special tokens:
    those of a chat are in its template.
    """
    chats = [find_task(example.task).messages(example.row) for example in examples]
    if not any(chats):
        return [example.prompt for example in examples], True
    return [chat_text(turns[:-1], tokenizer, wanted=BY_ROWS) for turns in chats], False
