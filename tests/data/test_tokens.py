"""Token ids and the positions that each loss looks at."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from semalign.data.batches import length_buckets, pad, places, position_mask
from semalign.data.tokens import Tokens, fingerprint, prompt_ids, starts, tokenise
from semalign.errors import UserError
from semalign.models.loading import load_tokenizer
from semalign.stages.scoring import requests
from semalign.tasks import TASKS
from semalign.tasks.protocols import find_protocol
from semalign.tasks.task import Example


def example(prompt: str, answer: str, name: str = "x") -> Example:
    return Example(id=name, task="gsm8k", prompt=prompt, answer=answer, row={})


@pytest.fixture(scope="module")
def tokenizer(family: dict[str, Path]):  # type: ignore[no-untyped-def]
    return load_tokenizer(family["student"])


def test_answer_and_eos_are_supervised(tokenizer) -> None:  # type: ignore[no-untyped-def]
    [found] = tokenise([example("Question: 1+1?\nAnswer:", " 2")], tokenizer, max_length=64)
    supervised = [found.ids[t + 1] for t in range(len(found.ids))[found.supervised_positions]]
    assert tokenizer.decode(supervised[:-1]) == " 2"
    assert supervised[-1] == tokenizer.eos_token_id
    assert found.ids[: found.prompt_length] == tuple(
        tokenizer("Question: 1+1?\nAnswer:")["input_ids"]
    )


def test_positions() -> None:
    row = Tokens("x", (5, 6, 7, 8, 9), 3)
    assert row.align_positions("all") == slice(0, 5)
    assert row.align_positions("answer") == row.supervised_positions == slice(2, 4)
    prompt = Tokens("a", row.ids[:3], 3)
    assert prompt.align_positions("all") == slice(0, 3)
    assert prompt.align_positions("answer") == slice(2, 3)
    assert range(3)[prompt.supervised_positions] == range(0)


def test_a_prompt_that_leaves_no_answer(tokenizer) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"data\.max_length=3: example q7"):
        tokenise([example("Question: 1+1?\nAnswer:", " 2", "q7")], tokenizer, max_length=3)


def test_long_answers_are_cut(tokenizer) -> None:  # type: ignore[no-untyped-def]
    [found] = tokenise([example("Q:", " 1 2 3 4 5 6 7 8 9")], tokenizer, max_length=8)
    assert len(found.ids) == 8


def test_fingerprint_sees_ids_and_boundaries() -> None:
    base = [Tokens("a", (1, 2, 3), 1), Tokens("b", (4, 5), 1)]
    others = [base[::-1], [Tokens("a", (1, 2, 3), 2), base[1]], base[:1]]
    assert len({fingerprint(rows) for rows in [base, *others]}) == 4
    assert fingerprint(base) == fingerprint([Tokens("z", (1, 2, 3), 1), base[1]])


def test_buckets_hold_every_row_once_within_the_budget() -> None:
    rows = [Tokens(str(n), tuple(range(n)), 1) for n in (9, 3, 3, 8, 30, 2)]
    batches = list(length_buckets(rows, 12))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or max(len(rows[i].ids) for i in batch) * len(batch) <= 12


def test_padding_is_on_the_right() -> None:
    rows = [Tokens("a", (4, 5, 6), 1), Tokens("b", (7, 8), 1)]
    ids, mask = pad(rows, pad_id=9)
    assert ids.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert position_mask(rows, lambda e: e.supervised_positions, 3).tolist() == [
        [True, True, False],
        [True, False, False],
    ]
    assert places(rows, lambda e: e.supervised_positions, 3).tolist() == [0, 1, 3]


CODE = 'def one():\n    """One."""\n'


def merging() -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer: a newline and the indentation after it are one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{CODE}    return 1\n", "Code:\ndef one():\n    return 1\n", "Answer: x\t\n  x"]
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def punctuated() -> PreTrainedTokenizerFast:
    """Llama 3's kind: a newline belongs to the quotes before it."""
    made = Tokenizer(models.WordLevel({'"""\n': 0, '"""': 1, "\n": 2, "?": 3, "</s>": 4}, "?"))
    quotes = pre_tokenizers.Split(Regex('"""\n|"""|\n| +'), "isolated")
    made.pre_tokenizer = quotes
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="?")


@pytest.mark.parametrize(
    "prompt", [CODE, "Code:\n", "Code:\n\n", "```python\n", "Answer: ", "x\t\n "]
)
def test_whitespace_that_the_tokenizer_would_join_is_the_answers(prompt: str) -> None:
    tokens = merging()
    [ids] = prompt_ids([prompt], tokens)
    assert tokens.decode(ids) == prompt.rstrip()
    assert prompt_ids([prompt], tokens, strip=False) == [tokens(prompt)["input_ids"]]
    [whole] = prompt_ids([f"{prompt}    return 1"], tokens)
    assert starts(whole, ids)


def test_whitespace_with_a_token_of_its_own_stays(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for prompt in (CODE, "Code:\n", "Answer:"):
        assert prompt_ids([prompt], tokenizer) == [tokenizer(prompt)["input_ids"]]
    assert prompt_ids(['"""\n', "x"], punctuated()) == [[0], [3]]  # stripped, it would be the 1
    assert prompt_ids([], tokenizer) == []


@pytest.mark.parametrize("protocol", ["paper-2", "paper-1"])
def test_training_and_evaluation_have_one_boundary(
    protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = merging()
    row = {"task_id": "t", "prompt": CODE, "canonical_solution": "    return 1\n"}
    row |= {"entry_point": "one", "test": "def check(f):\n    assert f() == 1\n"}
    made = [TASKS["humaneval"].example(row, 0)]
    [trained] = tokenise(made, tokens, max_length=99)
    [request] = requests(made, tokens, find_protocol(protocol), max_model_len=999)
    same = trained.ids[: trained.prompt_length] == request.prompt_ids
    assert same == (protocol == "paper-2") == (not request.joined)
    assert tokens.decode(trained.ids[trained.prompt_length : -1]) == "\n    return 1\n"
    assert not caplog.records
    tokenise([example("Q: (", "((", "q7"), example("Q:", " x")], joining(), max_length=99)
    assert "joins the end of 1 of 2 prompts of gsm8k with the answer, first q7" in caplog.text


def joining() -> PreTrainedTokenizerFast:
    """A run of brackets is one token."""
    made = Tokenizer(models.WordLevel({"Q:": 0, "(": 1, "(((": 2, "x": 3, "</s>": 4}, "x"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


@pytest.mark.parametrize(("template", "text"), [("<s> $A </s>", "x"), ("<s> $A", "<s>x")])
def test_one_bos_and_no_eos(template: str, text: str) -> None:
    made = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "x": 2}, "x"))
    special = [("<s>", 0), ("</s>", 1)]
    made.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    tokens = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    assert prompt_ids([text], tokens) == [[0, 2]]
    [found] = tokenise([example("x", "x")], tokens, max_length=9)
    assert (found.ids[0], found.ids[-1], found.ids.count(1)) == (0, 1, 1)
    assert prompt_ids(["x"], tokens, special=False) == [[2]]
