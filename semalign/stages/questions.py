"""What can be known of an evaluation before any model is run."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from semalign.config.sections import Evaluation
from semalign.models.loading import load_tokenizer
from semalign.models.reference import Model
from semalign.sandbox.run import require_tier
from semalign.stages.scoring import check_chat_template, chosen_protocol, requests
from semalign.tasks import find_task, load_split


def check_questions(models: Iterable[Model], settings: Evaluation, root: Path) -> None:
    """Make the first request of every task and split for every model whose tokenizer is at hand.

    Raises UserError for a sandbox weaker than `sandbox.min_tier`, a chat template that is missing
    or cannot be rendered, and a tokenizer that does not give each choice a token of its own.
    """
    chosen_protocol(settings)
    if any(find_task(task).kind == "code" for task in settings.tasks):
        require_tier(settings.sandbox.min_tier)
    for model in models:
        if not model.absent:
            content = model.tokens, model.serving
            _check(model.path, content, model.trust_remote_code, settings, root)


@lru_cache(maxsize=64)  # a sweep checks every trial
def _check(
    path: str, content: tuple[str, str], trust: bool, settings: Evaluation, root: Path
) -> None:
    protocol, tokenizer = chosen_protocol(settings), load_tokenizer(path, trust_remote_code=trust)
    if any(protocol.profile(task).chat == "template" for task in settings.tasks):
        check_chat_template(tokenizer)
    for task in settings.tasks:
        for split in settings.splits:
            first = load_split(root, task, split)[:1]
            requests(first, tokenizer, protocol, max_model_len=settings.max_model_len)
