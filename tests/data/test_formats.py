"""Rows as trl and axolotl read them: chats, prompts with completions, plain text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from semalign.config.read import resolve
from semalign.data.tokens import tokenise
from semalign.errors import UserError
from semalign.methods.method import effective
from semalign.models.loading import load_tokenizer
from semalign.plugins import load_plugins
from semalign.stages.scoring import requests
from semalign.tasks import TASKS, Example, load_split
from semalign.tasks.protocols import find_protocol

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STORIES = Path("examples/tasks/stories.yaml").resolve()


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TASKS, "_things", dict(TASKS))
    monkeypatch.setenv("SEMALIGN_PLUGINS", "")


def rows(folder: Path, text: str, row: dict[str, Any]) -> list[Example]:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "mine.yaml").write_text(f"splits: {{train: rows.jsonl}}\n{text}\n")
    load_plugins([str(folder / "mine.yaml")])
    return load_split(folder, "mine", "train")


def test_prompt_and_completion(tmp_path: Path) -> None:
    [example] = rows(tmp_path, "format: completion", {"prompt": "Is it?", "completion": " Yes."})
    assert (example.prompt, example.answer) == ("Is it?", " Yes.")


def test_messages_go_through_the_chat_template_in_training_and_evaluation(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Is it red?"},
        {"role": "assistant", "content": "Yes."},
    ]
    examples = rows(
        tmp_path,
        "format: messages\ncolumns: {messages: conversation}",
        {"conversation": turns},
    )
    assert examples[0].answer == "Yes."
    tokenizer = load_tokenizer("zoo/student")
    with pytest.raises(UserError, match="has no chat template, which rows of messages need"):
        tokenise(examples, tokenizer, max_length=64)
    tokenizer.chat_template = TEMPLATE
    [tokens] = tokenise(examples, tokenizer, max_length=64)
    before = tokenizer.decode(tokens.ids[: tokens.prompt_length])
    assert before == "<s>[system]Be short.[user]Is it red?[assistant]"
    assert tokenizer.decode(tokens.ids[tokens.prompt_length :]) == "Yes.</s>"
    [request] = requests(examples, tokenizer, find_protocol("paper"), max_model_len=256)
    assert request.prompt_ids == tokens.ids[: tokens.prompt_length]
    with pytest.raises(UserError, match="must end in a turn of the assistant"):
        rows(tmp_path, "format: messages", {"messages": turns[:2]})
    with pytest.raises(UserError, match="must be a list of"):
        rows(tmp_path, "format: messages", {"messages": [{"from": "human"}]})


def test_a_corpus_is_aligned_everywhere_and_has_no_cross_entropy(tmp_path: Path) -> None:
    examples = rows(tmp_path, "format: text", {"text": "Ann has 3 eggs."})
    [tokens] = tokenise(examples, load_tokenizer("zoo/student"), max_length=64)
    last = len(tokens.ids) - 1
    assert tokens.prompt_length == 1 and tokens.supervised_positions == slice(0, last)
    assert tokens.align_positions("all") == slice(0, last + 1)

    def settings(*given: str) -> Any:
        return effective(resolve([], [f"data.task={STORIES}", *given]))

    assert settings().loss.beta == 0 and settings().loss.alpha == 0.1
    assert settings("method=logit-kd").loss.beta == 0
    with pytest.raises(UserError, match=r"a corpus has no labels; expected loss\.beta=0, found 1"):
        settings("loss.beta=1")
    with pytest.raises(UserError, match=r"data\.labelled_limit: .* no labels; leave it out"):
        settings("data.labelled_limit=5")
    with pytest.raises(UserError, match=r"method=sft learns from nothing else"):
        settings("method=sft")
