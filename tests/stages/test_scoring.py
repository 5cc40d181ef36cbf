"""Requests and records without an engine: what is asked, how answers are judged and kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from semalign import zoo
from semalign.artifacts.records import (
    Journal,
    Record,
    item_scores,
    read_records,
    shares,
    write_records,
)
from semalign.config.sections import Sandbox
from semalign.errors import UserError
from semalign.models.loading import load_model, load_tokenizer
from semalign.models.reference import Model
from semalign.stages.judged import Candidate, Records
from semalign.stages.scoring import Generation, choice_ids, judge, requests
from semalign.tasks import TASKS, Example, load_split
from semalign.tasks.extraction import first_fence
from semalign.tasks.protocols import find_protocol
from semalign.zoo import scoring

LETTERS = (" A", " B", " C", " D")

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


PAPER = find_protocol("paper")


@pytest.mark.parametrize("bos", [True, False])
def test_special_tokens_come_once_and_as_the_tokenizer_adds_them(bos: bool) -> None:
    tokens = tokenizer("Question: Answer: A B C D", bos=bos)
    for request in requests(examples("gsm8k", GSM8K), tokens, PAPER, max_model_len=99):
        assert list(request.prompt_ids) == tokens(examples("gsm8k", GSM8K)[0].prompt)["input_ids"]
        assert request.prompt_ids.count(0) == int(bos)
        assert not request.truncated
    asked = requests(examples("mmlu", MMLU), tokens, PAPER, max_model_len=99)[1]
    assert asked.choice_ids == tuple(tokens.convert_tokens_to_ids(list("ABCD")))
    assert (asked.id, asked.max_tokens, asked.n) == ("mmlu/1", 1, 1)


def test_letters_without_tokens_of_their_own_are_refused() -> None:
    with pytest.raises(UserError, match="each a token of its own"):
        choice_ids("Answer:", LETTERS, tokenizer("Answer: A B C", bos=False))
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate("<A: BCDnswer")}, "<"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    split = PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<")
    with pytest.raises(UserError, match="each a token of its own"):
        choice_ids("Answer:", LETTERS, split)  # a space, then the letter: two tokens


def test_room_to_answer() -> None:
    tokens = tokenizer("x", bos=False)
    words = len(tokens(examples("gsm8k", GSM8K, 1)[0].prompt)["input_ids"])
    for length, kept, room in [
        (4 * words, words, 3 * words),
        (words, words - words // 2, words // 2),
    ]:
        (asked,) = requests(examples("gsm8k", GSM8K, 1), tokens, PAPER, max_model_len=length)
        assert (len(asked.prompt_ids), asked.max_tokens) == (kept, room)
        assert asked.truncated == (kept < words)
    (asked,) = requests(
        examples("mmlu", MMLU, 1), tokenizer("A B C D", bos=False), PAPER, max_model_len=4
    )
    assert (len(asked.prompt_ids), asked.max_tokens, asked.truncated) == (3, 1, True)
    assert requests([], tokens, PAPER, max_model_len=3) == []


def test_chat_templates_and_forced_prefixes() -> None:
    words = "</s> <|user|> <|assistant|> The answer is: A B C D"
    tokens = tokenizer(words, bos=True)
    chat = find_protocol("paper-chat")
    with pytest.raises(UserError, match="has no chat template, which this protocol wants"):
        requests(examples("gsm8k", GSM8K), tokens, chat, max_model_len=99)
    tokens.chat_template = "<s> {{ messages[0]['content'] }} </s>"
    (asked,) = requests(examples("mmlu", MMLU, 1), tokens, chat, max_model_len=99)
    assert asked.prompt_ids.count(0) == 1 and asked.prompt_ids[0] == 0  # the template's own BOS
    assert tokens.decode(asked.prompt_ids[-1]) == "<unk>"  # the forced "Answer:"
    tulu = find_protocol("open-instruct")
    (asked,) = requests(examples("mmlu", MMLU, 1), tokens, tulu, max_model_len=99)
    said = tokens.decode(asked.prompt_ids, skip_special_tokens=False)
    assert said.startswith("<s> <|user|>") and said.endswith("<|assistant|> The answer is:")


def judged(task: str, row: dict[str, Any], said: list[Generation], **how: Any) -> list[Record]:
    tokens = tokenizer("A B C D", bos=False)
    protocol = how.pop("protocol", PAPER)
    items = examples(task, row, len(said))
    asked = requests(items, tokens, protocol, max_model_len=99)
    limits = Sandbox(num_workers=2)
    return judge(items, asked, said, split="dev", protocol=protocol, sandbox=limits, **how)


def test_every_kind_is_judged() -> None:
    choices = [
        Generation(choice_scores=scores) for scores in [(-2.0, -1.0, -3.0, -4.0), (0, -9) * 2]
    ]
    records = judged("mmlu", MMLU, choices)
    assert [(r.output, r.extracted, r.correct, r.group) for r in records] == [
        (" B", "B", True, "s"),
        (" A", "A", False, "s"),
    ]
    assert records[0].choice_scores == [-2.0, -1.0, -3.0, -4.0]
    texts = [
        Generation(texts=(text,), token_ids=((1, 2),), unfinished=(text == " no",))
        for text in (" 2+2=4\n#### 4", " no")
    ]
    records = judged("gsm8k", GSM8K, texts)
    assert [(r.extracted, r.correct, r.tokens, r.profile) for r in records] == [
        ("4", True, [1, 2], PAPER.label("gsm8k")),
        (None, False, [1, 2], PAPER.label("gsm8k")),
    ]
    code = [
        Generation(
            texts=("def f(): return 1", "def f(): return 2"),
            token_ids=((1,), (2,)),
            unfinished=(False,) * 2,
        )
        for _ in range(2)
    ]
    records = judged("mbpp", MBPP, code)
    assert [(r.id, r.sample, r.correct) for r in records] == [
        ("mbpp/0", 0, True),
        ("mbpp/0", 1, False),
        ("mbpp/1", 0, True),
        ("mbpp/1", 1, False),
    ]
    assert [r.reason for r in records[:2]] == ["passed", "AssertionError: "]
    assert item_scores(records) == {"mbpp/0": 0.5, "mbpp/1": 0.5}
    assert item_scores(records, k=2) == {"mbpp/0": 1.0, "mbpp/1": 1.0}


FENCED = "Here it is:\n\n```python\ndef f(): return 1\n```\nIt returns 1."
ANSWERS = ("def f(): return 1", FENCED, "```\n```", "")


@pytest.mark.parametrize(
    ("protocol", "right"), [("paper-1", [1, 0, 0, 0]), ("paper", [1, 1, 0, 0])]
)
def test_code_is_found_as_the_protocol_says(protocol: str, right: list[int]) -> None:
    generations = [
        Generation(texts=(text,), token_ids=((1,),), unfinished=(text == "",)) for text in ANSWERS
    ]
    records = judged("mbpp", MBPP, generations, protocol=find_protocol(protocol))
    assert [record.correct for record in records] == list(map(bool, right))
    found = [record.extracted for record in records]
    fenced = ["def f(): return 1\n", None] if protocol == "paper" else [FENCED, "```\n```"]
    assert found == ["def f(): return 1", *fenced, None]
    limits = {"cut_answers": 0.25, "cut_prompts": 0.0, "joined_prompts": 0.0}
    assert shares(records) == {"no_answer": found.count(None) / 4, **limits}


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_models_are_prompted_alike_under_both_versions(task: str) -> None:
    items = load_split(zoo.path("zoo/data"), task, "test")[:50]
    tokens = load_tokenizer("zoo/student")
    first, newest = (
        requests(items, tokens, find_protocol(name), max_model_len=1024)
        for name in ("paper-1", "paper")
    )
    assert first == newest and not any(request.joined for request in first)
    assert TASKS[task].kind != "code" or all(first_fence(i.answer) == i.answer for i in items)


def test_the_shipped_models_answer_code_without_fences() -> None:
    model, tokens = load_model("zoo/student"), load_tokenizer("zoo/student")
    for task in ("humaneval", "mbpp"):
        answers = scoring.answers(model, tokens, load_split(zoo.path("zoo/data"), task, "dev")[:2])
        assert list(map(first_fence, answers)) == answers


def texts(*numbers: int) -> list[Record]:
    return judged(
        "gsm8k",
        GSM8K,
        [Generation(texts=(f" {n}",), token_ids=((n,),), unfinished=(False,)) for n in numbers],
    )


def test_records_are_kept_whole(tmp_path: Path) -> None:
    records = texts(4, 5, 4)
    write_records(tmp_path / "records.parquet", records)
    assert read_records(tmp_path / "records.parquet") == records
    assert [file.name for file in tmp_path.iterdir()] == ["records.parquet"]
    assert item_scores(records) == {"gsm8k/0": 1.0, "gsm8k/1": 0.0, "gsm8k/2": 1.0}
    (tmp_path / "records.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match=r"records\.parquet: not a file of records"):
        read_records(tmp_path / "records.parquet")


def test_a_journal_resumes_by_item(tmp_path: Path) -> None:
    records, ids = texts(4, 5, 4, 6), [f"gsm8k/{n}" for n in range(4)]
    file = tmp_path / "records.parquet"
    journal = Journal(file, ids)
    assert journal.missing() == [0, 1, 2, 3]
    journal.add(records[2:3])
    journal.add(records[:1])
    resumed = Journal(file, ids)
    assert resumed.missing() == [1, 3] and not file.exists()
    resumed.add([records[3], records[1]])
    assert resumed.missing() == Journal(file, ids).missing() == []
    assert read_records(file) == records
    assert [path.name for path in tmp_path.iterdir()] == ["records.parquet"]


def test_two_runs_that_answer_the_same_leave_one_whole_file(tmp_path: Path) -> None:
    records, ids = texts(4, 5, 4, 6), [f"gsm8k/{n}" for n in range(4)]
    file = tmp_path / "records.parquet"
    first, second = Journal(file, ids), Journal(file, ids)
    second.add(records[:2])
    first.add(records[:2])
    third = Journal(file, ids)  # finds both parts, each item once
    assert third.missing() == [2, 3]
    first.add(records[2:])
    assert read_records(file) == records
    second.add(records[2:])
    assert first.missing() == second.missing() == third.missing() == []
    third.add(records[2:])
    assert read_records(file) == records
    assert [path.name for path in tmp_path.iterdir()] == ["records.parquet"]


def test_parts_that_another_run_removes_are_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, ids = texts(4, 5), ["gsm8k/0", "gsm8k/1"]
    file = tmp_path / "records.parquet"
    Journal(file, ids).add(records[:1])
    slow = Journal(file, ids)

    def ended_meanwhile(path: Path, rows: list[Record]) -> None:
        write_records(file, records)
        shutil.rmtree(file.with_suffix(".parts"))
        write_records(path, rows)

    monkeypatch.setattr("semalign.artifacts.records.write_records", ended_meanwhile)
    slow.add(records[1:])
    assert read_records(file) == records and slow.missing() == []

    def removed_meanwhile(path: Path) -> list[Record]:
        path.unlink()
        return read_records(path)

    other = tmp_path / "other.parquet"
    monkeypatch.undo()
    Journal(other, ids).add(records[:1])
    monkeypatch.setattr("semalign.artifacts.records.read_records", removed_meanwhile)
    assert Journal(other, ids).missing() == [0, 1]


def test_the_key_follows_content_alone() -> None:
    items = examples("gsm8k", GSM8K)
    model = Model.open("zoo/student", dtype="float32")

    def key(items: list[Example], **changed: Any) -> str:
        records = Records(
            candidate=Candidate(name="student", model=model),
            task="gsm8k",
            split="test",
            examples=items,
            protocol=PAPER,
            max_model_len=99,
            min_tier=2,
        )
        return replace(records, **changed).key

    def candidate(**changed: str) -> Candidate:
        return Candidate(name="student", model=replace(model, **changed))

    first = key(items)
    assert first == key(examples("gsm8k", dict(GSM8K)))
    # its name is for people, and no code is run for GSM8K
    same = Candidate(name="other", model=Model.open("zoo/student", dtype="float32"))
    assert first == key(items, candidate=same) == key(items, min_tier=1)
    others = [
        key(items[:1]),
        key(items, split="dev"),
        key(items, candidate=candidate(weights="n")),
        key(items, candidate=candidate(dtype="bfloat16")),
        key(items, candidate=candidate(tokens="n")),
        key(items, candidate=candidate(serving="another chat template")),
        key(items, protocol=find_protocol("paper-chat")),
        key(items, max_model_len=98),
        key(examples("gsm8k", GSM8K | {"answer": "5\n#### 5"})),
    ]
    assert len({first, *others}) == 10
    code = examples("mbpp", MBPP)
    assert key(code, task="mbpp") != key(code, task="mbpp", min_tier=1)
