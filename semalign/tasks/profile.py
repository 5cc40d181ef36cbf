"""How a task is evaluated under one protocol, and where its published rows are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

LIBRARY = Path(__file__).with_name("lm_eval")  # lm_eval task files; `library` may be absolute too

# What several code tasks share: the start of a fenced answer, and open-instruct's request and
# sampling.
CODE_FENCE = "```python\n"
COMPLETE_FUNCTION = "Complete the following python function.\n\n\n"
TWENTY_SAMPLES: dict[str, Any] = {"n": 20, "temperature": 0.1, "top_p": 0.95}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How one task is prompted, decoded and judged.

    ``prompt`` and ``prefix``, the forced start of the answer, are Jinja templates over a row. With
    ``strip`` whitespace at the end of what the model continues is left to its answer, where the
    tokenizer would join the two (see `semalign.data.tokens.prompt_ids`). ``chat`` is how a prompt
    becomes a turn: not at all, in Tulu's plain format, or by the tokenizer's own template. With
    ``choices`` the next-token score of each decides; otherwise text is generated: ``n`` samples, at
    most ``max_tokens``, up to a ``stop`` string, scored as pass@``k``. ``reader`` names how a text
    task's answer is read, and how the code in an answer is found (`semalign.tasks.extraction`);
    ``timeout_s`` (wall clock) and ``memory_mb`` (address space) bound a program. ``library`` is the
    lm_eval task file that gives prompt, choices, stops and metric instead.
    """

    prompt: str = ""
    prefix: str = ""
    strip: bool = False
    chat: Literal["none", "tulu", "template"] = "none"
    choices: tuple[str, ...] = ()
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    k: int = 1
    reader: str = ""
    timeout_s: float = 3.0
    memory_mb: int = 512
    library: str = ""


@dataclass(frozen=True, kw_only=True)
class FileProfile(Profile):
    """A profile of a task file; `definition` is all of the file that judges answers, as JSON."""

    definition: str = ""


@dataclass(frozen=True, kw_only=True)
class LibraryTask:
    """The lm_eval task of a benchmark: its file, and the metric and the filter that count."""

    file: str
    metric: str
    filter: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """A benchmark as its authors published it, and its dataset (id, configuration) on the hub.

    ``splits`` holds the numbers of each split's rows: those in the ids where rows have ids of their
    own, places in the file otherwise. ``file`` is what the one file of all splits is called, and
    None where each split has a file of its own.
    """

    hub: tuple[str, str]
    prefix: str
    splits: Mapping[str, range]
    file: str | None = None

    def ids(self, splits: Sequence[str]) -> list[str]:
        """The ids of the examples of these splits."""
        numbers = chain.from_iterable(self.splits[split] for split in splits)
        return [f"{self.prefix}/{number}" for number in numbers]
