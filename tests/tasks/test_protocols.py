"""Protocols: their prompts to the character, and hashes that change only on purpose."""

from __future__ import annotations

from typing import Any

import pytest

from semalign.errors import UserError
from semalign.tasks import TASKS
from semalign.tasks.protocols import PROTOCOLS, find_protocol
from semalign.tasks.task import render

ROWS: dict[str, dict[str, Any]] = {
    "mmlu": {
        "question": "1+1?",
        "subject": "high_school_sums",
        "choices": list("1234"),
        "answer": 1,
    },
    "gsm8k": {"question": "Two and two?", "answer": "#### 4"},
    "humaneval": {"prompt": "def one():\n"},
    "mbpp": {
        "text": "Write a function for 1.",
        "code": "import re\r\ndef one(x): return {1: 1}[x]",
        "test_list": ["assert one(1) == 1"],
    },
}

# Prompt and forced prefix of open-instruct's tasks, as Seeking and LaTen were presumably evaluated.
OPEN_INSTRUCT = {
    "mmlu": (
        "The following are multiple choice questions (with answers) about  high school sums.\n\n"
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        "The answer is:",
    ),
    "gsm8k": ("Answer the following question.\n\nQuestion: Two and two?", "Answer:"),
    "humaneval": (
        "Complete the following python function.\n\n\ndef one():\n",
        "Here is the function:\n\n```python\ndef one():\n",
    ),
    "mbpp": (
        "Complete the following python function.\n\n\nWrite a function for 1.\n"
        "import re\r\ndef one(x)",
        "Here is the completed function:\n\n\n```python\n",
    ),
}


LABELS = {
    "paper-1 mmlu": "paper-1@6acf17c1c3bd",
    "paper-1 gsm8k": "paper-1@10a2bfa2d5e9",
    "paper-1 humaneval": "paper-1@3cc9f2da1518",
    "paper-1 mbpp": "paper-1@afbe5d0b994b",
    "paper-chat-1 mmlu": "paper-chat-1@ac58c20a5348",
    "paper-chat-1 gsm8k": "paper-chat-1@4e8bdfdd9b2a",
    "paper-chat-1 humaneval": "paper-chat-1@0133063ab75d",
    "paper-chat-1 mbpp": "paper-chat-1@db36c7b8f758",
    "paper-2 mmlu": "paper-2@3c280f5301ab",
    "paper-2 gsm8k": "paper-2@512ee7b1097d",
    "paper-2 humaneval": "paper-2@80154f5274b3",
    "paper-2 mbpp": "paper-2@45d52ef81973",
    "paper-chat-2 mmlu": "paper-chat-2@9e3e29f768ca",
    "paper-chat-2 gsm8k": "paper-chat-2@db2a8881dd55",
    "paper-chat-2 humaneval": "paper-chat-2@c7eb7b56be59",
    "paper-chat-2 mbpp": "paper-chat-2@3748acd9434f",
    "open-instruct-1 mmlu": "open-instruct-1@41a2aad06468",
    "open-instruct-1 gsm8k": "open-instruct-1@ede528a706ab",
    "open-instruct-1 humaneval": "open-instruct-1@371c44c2d0b4",
    "open-instruct-1 mbpp": "open-instruct-1@a7d959375ad9",
    "lm-eval-1 mmlu": "lm-eval-1@6532712d0e49",
    "lm-eval-1 gsm8k": "lm-eval-1@4618ea963e59",
}


@pytest.mark.parametrize("task", OPEN_INSTRUCT)
def test_open_instruct_to_the_character(task: str) -> None:
    profile = find_protocol("open-instruct").profile(task)
    found = render(profile.prompt, ROWS[task]), render(profile.prefix, ROWS[task])
    assert found == OPEN_INSTRUCT[task]


def test_open_instruct_samples_code_twenty_times() -> None:
    for task, timeout in (("humaneval", 3.0), ("mbpp", 10.0)):
        profile = find_protocol("open-instruct").profile(task)
        found = profile.n, profile.temperature, profile.top_p, profile.max_tokens, profile.timeout_s
        assert found == (20, 0.1, 0.95, 512, timeout)


def test_every_template_renders() -> None:
    for protocol in PROTOCOLS.values():
        for task, profile in protocol.profiles.items():
            text = render(profile.prompt, ROWS[task]) + render(profile.prefix, ROWS[task])
            assert profile.library or text, (protocol.name, task)
            assert "{" not in text.replace("{1: 1}", "")


def test_a_score_of_one_version_stays_comparable() -> None:
    """A profile that changes needs a new version; then its line here changes with it."""
    labels = {
        f"{name} {task}": p.label(task)
        for name, p in PROTOCOLS.items()
        for task in p.profiles
        if name == f"{p.name}-{p.version}"
    }
    assert labels == LABELS


def test_a_name_alone_is_the_newest_version_and_older_ones_stay() -> None:
    for name in ("paper", "paper-chat"):
        newest, first = find_protocol(name), find_protocol(f"{name}-1")
        assert (newest, newest.version, first.version) == (find_protocol(f"{name}-2"), 2, 1)
        for task in first.profiles:
            before, now = first.profile(task), newest.profile(task)
            assert (before.prompt, before.prefix, before.stop) == (now.prompt, now.prefix, now.stop)
            assert (before.strip, now.strip) == (False, True)
            code = TASKS[task].kind == "code"
            assert now.reader == ("first-fence" if code else before.reader)
    assert find_protocol("open-instruct").version == find_protocol("lm-eval").version == 1


def test_sampling_makes_another_protocol() -> None:
    paper = find_protocol("paper")
    sampled = paper.sampled(n=20, temperature=0.1, top_p=0.95, k=10)
    assert sampled.name == "paper+n20t0.1p0.95k10" and sampled.hash != paper.hash
    assert sampled.label("gsm8k") == "paper+n20t0.1p0.95k10-2@" + paper.label("gsm8k")[-12:]
    assert sampled.profile("mbpp").n == 20 and sampled.profile("gsm8k").n == 1
    with pytest.raises(UserError, match=r"sampling\.k=5: pass@5 needs at least 5 samples"):
        paper.sampled(n=1, temperature=0.1, top_p=0.95, k=5)


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"protocol 'papre' is unknown; did you mean 'paper'\?"):
        find_protocol("papre")
    with pytest.raises(UserError, match="'lm-eval' has no profile for mbpp; it has mmlu"):
        find_protocol("lm-eval").profile("mbpp")
