"""Chats as text, by the chat template of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from semalign.errors import UserError
from semalign.tasks import Example, find_task


def chat_text(turns: Sequence[Mapping[str, str]], tokenizer: Any) -> str:
    """The turns in the tokenizer's chat template, up to where the next answer begins.

    It holds the special tokens. Raises UserError for a tokenizer without a chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template, which rows of messages "
            "need; expected a model that is tuned to chat"
        )
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def training_prompts(examples: Sequence[Example], tokenizer: Any) -> tuple[list[str], bool]:
    """The prompts of examples of one task, and whether the tokenizer adds the special tokens:
    those of a chat are in its template.
    """
    chats = [find_task(example.task).messages(example.row) for example in examples]
    if not any(chats):
        return [example.prompt for example in examples], True
    return [chat_text(turns[:-1], tokenizer) for turns in chats], False
