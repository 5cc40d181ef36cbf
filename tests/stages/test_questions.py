"""Chat templates are rendered before anything is run, and what decides a score is in its key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from semalign.config.read import resolve
from semalign.config.sections import Evaluation
from semalign.data.root import data_root
from semalign.errors import UserError
from semalign.methods.method import Transfer
from semalign.models.loading import load_tokenizer
from semalign.models.reference import Model
from semalign.stages.judged import Candidate, Records
from semalign.stages.questions import check_questions
from semalign.stages.scoring import chosen_protocol, user_turn
from semalign.tasks import load_split
from semalign.zoo import path as zoo_path

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
CHAT = Evaluation(tasks=("mmlu",), splits=("dev",), protocol="paper-chat")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the shipped student with a chat template."""
    folder = Path(shutil.copytree(zoo_path("zoo/student"), tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def opened(folder: Path) -> Model:
    return Model.open(str(folder), dtype="float32", planned=True)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% if messages %}", "rendered (TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "cannot be rendered (TypeError"),
        ("{{ nothing.at.all }}", "cannot be rendered (UndefinedError"),
        ("{{ messages[1].content }}", "cannot be rendered (UndefinedError"),
        ("{% for m in messages if m.role == 'human' %}{{ m.content }}{% endfor %}<|bot|>",
         "leaves the question out: it gives '<|bot|>'"),
        ("", "has no chat template, which this protocol wants"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_one_line(template: str, match: str, model: Path) -> None:
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError) as error:
        check_questions([opened(model)], CHAT, data_root("zoo/data"))
    assert match in str(error.value)
    assert "\n" not in str(error.value) and "protocol=paper" in str(error.value)
    check_questions([opened(model)], CHAT.model_copy(update={"protocol": "paper"}),
                    data_root("zoo/data"))  # fmt: skip


def test_templates_without_a_default_are_one_line(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    file = model / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": TEMPLATE}, {"name": "rag", "template": TEMPLATE}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    with pytest.raises(UserError, match=r"cannot be rendered \(ValueError"):
        check_questions([opened(model)], CHAT, data_root("zoo/data"))


@pytest.mark.parametrize("planned", [True, False])
def test_a_transfer_is_refused_before_anything_is_made(
    model: Path, tmp_path: Path, planned: bool
) -> None:
    (model / "chat_template.jinja").write_text("{% if %}")
    given = [
        f"teacher={model}",
        f"student={model}",
        f"workdir={tmp_path / 'work'}",
        "evaluation.protocol=paper-chat",
    ]
    with pytest.raises(UserError, match=r"chat template of the tokenizer .*model cannot be rend"):
        Transfer.of(resolve([], [*given, "evaluation.tasks=[mmlu]"]), planned=planned)
    assert not (tmp_path / "work").exists()


def test_choices_without_tokens_of_their_own_are_refused_before(model: Path) -> None:
    """A tokenizer that lower-cases its text."""
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    lowered = {"type": "Replace", "pattern": {"Regex": "[A-D]$"}, "content": "x"}
    file.write_text(json.dumps(content | {"normalizer": lowered}))
    plain = CHAT.model_copy(update={"protocol": "paper"})
    with pytest.raises(UserError, match="does not give ' A', ' B', ' C', ' D' each a token of its"):
        check_questions([opened(model)], plain, data_root("zoo/data"))


def test_a_template_with_a_clock_renders_alike_every_day(model: Path) -> None:
    """As Llama 3's do: records of yesterday are found again, so its prompts must be the same."""
    clock = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    (model / "chat_template.jinja").write_text(clock)
    assert user_turn("Hello", load_tokenizer(model)) == "26 Jul 2024 Hello"


def records_key(folder: Path, **changes: Any) -> str:
    """Names what the model answers."""
    settings = CHAT.model_copy(update=changes)
    return Records(
        candidate=Candidate(name="any", model=Model.open(str(folder), dtype="float32")),
        task="mmlu",
        split="dev",
        examples=load_split(data_root("zoo/data"), "mmlu", "dev")[:2],
        protocol=chosen_protocol(settings),
        max_model_len=settings.max_model_len,
        min_tier=2,
    ).key


def edit(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def _add_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["Paris"])
    tokenizer.save_pretrained(folder)


def _remove_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


CHANGES: dict[str, Callable[[Path], None]] = {
    "template": lambda f: (f / "chat_template.jinja").write_text(TEMPLATE + "!") and None,
    "no template": _remove_template,
    "named templates": lambda f: edit(f, "chat_template.json", chat_template=TEMPLATE + "!"),
    "stop ids": lambda f: edit(f, "generation_config.json", eos_token_id=[1, 5]),
    "added tokens": _add_token,
    "BOS": lambda f: edit(f, "tokenizer_config.json", add_bos_token=False),
    "vocabulary": lambda f: edit(f, "tokenizer.json", normalizer={"type": "Lowercase"}),
    "end of text": lambda f: edit(f, "config.json", eos_token_id=7),
    "RoPE": lambda f: edit(f, "config.json", rope_theta=5e5),
    "code": lambda f: (f / "tokenization_own.py").write_text("x = 1") and None,
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_a_score_is_in_its_key(what: str, model: Path) -> None:
    before = records_key(model)
    CHANGES[what](model)
    assert records_key(model) != before


def test_whose_code_is_run_is_in_the_key(model: Path) -> None:
    def identities() -> list[Any]:
        return [
            Model.open(str(model), dtype="float32", trust_remote_code=trust).identity
            for trust in (False, True)
        ]

    trusted, not_trusted = identities()
    assert trusted == not_trusted  # there is no code
    (model / "modeling_own.py").write_text("")
    trusted, not_trusted = identities()
    assert trusted != not_trusted


def test_what_decides_nothing_is_not(model: Path) -> None:
    before = records_key(model)
    (model / "README.md").write_text("a model")
    edit(model, "generation_config.json", temperature=0.5, top_p=0.9)  # every request has its own
    edit(model, "config.json", transformers_version="9.9")
    assert records_key(model.rename(model.with_name("renamed"))) == before
