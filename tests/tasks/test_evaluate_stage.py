"""Requests and records without an engine: what is asked, how answers are judged and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from semalign.errors import UserError
from semalign.stages.evaluate import Generation, SandboxLimits, choice_ids, judge, requests
from semalign.stages.records import content_key, read_records, summarise, write_records
from semalign.tasks import TASKS, Example
from semalign.tasks.scores import wilson_interval

MMLU = {"question": "1 + 1", "subject": "s", "choices": ["1", "2", "3", "4"], "answer": 1}
GSM8K = {"question": "2 + 2", "answer": "4\n#### 4"}
MBPP = {"task_id": 1, "text": "one", "code": "def f(): pass", "test_list": ["assert f() == 1"]}


def examples(task: str, row: dict[str, Any], count: int = 2) -> list[Example]:
    made = [TASKS[task].example(row, index) for index in range(count)]
    return [replace(example, id=f"{task}/{index}") for index, example in enumerate(made)]


def tokenizer(vocabulary: str, *, bos: bool) -> PreTrainedTokenizerFast:
    """Whole words as tokens, with or without a BOS of its own."""
    words = {word: index for index, word in enumerate(["<s>", "<unk>", *vocabulary.split()])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        special = [("<s>", 0)]
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("bos", [True, False])
def test_special_tokens_come_once_and_as_the_tokenizer_adds_them(bos: bool) -> None:
    tokens = tokenizer("Question: Answer: A B C D", bos=bos)
    for request in requests(examples("gsm8k", GSM8K), tokens, max_model_len=99):
        assert list(request.prompt_ids) == tokens(examples("gsm8k", GSM8K)[0].prompt)["input_ids"]
        assert request.prompt_ids.count(0) == int(bos)
    asked = requests(examples("mmlu", MMLU), tokens, max_model_len=99)[1]
    assert asked.choice_ids == tuple(tokens.convert_tokens_to_ids(list("ABCD")))
    assert (asked.id, asked.max_tokens, asked.n) == ("mmlu/1", 1, 1)


def test_letters_without_tokens_of_their_own_are_refused() -> None:
    with pytest.raises(UserError, match="each a token of its own"):
        choice_ids("Answer:", tokenizer("Answer: A B C", bos=False))


def test_room_to_answer() -> None:
    tokens = tokenizer("x", bos=True)
    (asked,) = requests(examples("gsm8k", GSM8K, 1), tokens, max_model_len=20)
    assert asked.max_tokens == 20 - len(asked.prompt_ids)
    with pytest.raises(UserError, match=r"gsm8k/0: the prompt has \d+ tokens"):
        requests(examples("gsm8k", GSM8K, 1), tokens, max_model_len=3)
    assert requests([], tokens, max_model_len=3) == []


def test_every_kind_is_judged() -> None:
    limits = SandboxLimits(workers=2)
    choices = [
        Generation(choice_scores=scores) for scores in [(-2.0, -1.0, -3.0, -4.0), (0, -9) * 2]
    ]
    records = judge(examples("mmlu", MMLU), choices, split="dev", sandbox=limits)
    assert [(r.output, r.extracted, r.correct) for r in records] == [
        (" B", "B", True),
        (" A", "A", False),
    ]
    texts = [Generation(texts=(text,), token_ids=((1, 2),)) for text in (" 2+2=4\n#### 4", " no")]
    records = judge(examples("gsm8k", GSM8K), texts, split="dev", sandbox=limits)
    assert [(r.extracted, r.correct, r.tokens) for r in records] == [
        ("4", True, [1, 2]),
        (None, False, [1, 2]),
    ]
    code = [
        Generation(texts=("def f(): return 1", "def f(): return 2"), token_ids=((1,), (2,)))
        for _ in range(2)
    ]
    records = judge(examples("mbpp", MBPP), code, split="dev", sandbox=limits)
    assert [(r.id, r.sample, r.correct, r.reason) for r in records] == [
        ("mbpp/0", 0, True, "passed"),
        ("mbpp/0", 1, False, "AssertionError: "),
        ("mbpp/1", 0, True, "passed"),
        ("mbpp/1", 1, False, "AssertionError: "),
    ]
    assert summarise(records)["mbpp", "dev"].value == 0.5
    assert summarise(records, k=2)["mbpp", "dev"].value == 1.0


def test_records_are_kept_whole_and_scored(tmp_path: Path) -> None:
    texts = [Generation(texts=(f" {n}",), token_ids=((n,),)) for n in (4, 5, 4)]
    records = judge(
        examples("gsm8k", GSM8K, 3), texts, split="test", sandbox=SandboxLimits(workers=1)
    )
    write_records(tmp_path / "records.parquet", records)
    assert read_records(tmp_path / "records.parquet") == records
    assert [file.name for file in tmp_path.iterdir()] == ["records.parquet"]
    found = summarise(records)["gsm8k", "test"]
    assert (found.n, found.value) == (3, pytest.approx(2 / 3))
    assert (found.low, found.high) == wilson_interval(found.value, 3)
    (tmp_path / "records.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match=r"records\.parquet: not a file of records"):
        read_records(tmp_path / "records.parquet")


def test_the_key_follows_content_alone() -> None:
    items = examples("gsm8k", GSM8K)
    key = content_key(items, "test", model="m")
    assert key == content_key(examples("gsm8k", dict(GSM8K)), "test", model="m")
    others = [
        content_key(items[:1], "test", model="m"),
        content_key(items, "dev", model="m"),
        content_key(items, "test", model="n"),
        content_key(examples("gsm8k", GSM8K | {"answer": "5\n#### 5"}), "test", model="m"),
    ]
    assert len({key, *others}) == 5
