"""Examples as token ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from semalign import zoo
from semalign.data.tokens import Tokens, tokenise
from semalign.models.loading import load_tokenizer
from semalign.tasks import load_split


@pytest.fixture(scope="session")
def tokens(family: dict[str, Path]) -> list[Tokens]:
    examples = load_split(zoo.path("zoo/data"), "gsm8k", "extract")[:10]
    return tokenise(examples, load_tokenizer(family["student"]), max_length=512)
