"""What the tasks and the transfer rely on in the zoo's tokenizer."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from semalign import zoo
from semalign.tasks import TASKS, load_split

TEXTS = ("", "Ünïcödé 語 🙂", "a\tb\r\n\n  c", "\n\n\n", "x  = 10**-3  # é", "<unknown>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(zoo.path("zoo/teacher"))


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_unchanged(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_newlines_and_letters_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]
    assert len(tokenizer.tokenize("\n\n\n")) == 3
    for letter in (" A", " B", " C", " D"):
        assert len(tokenizer.tokenize(letter)) == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_has_the_same_tokens_alone_as_with_its_answer(
    tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    for example in load_split(zoo.path("zoo/data"), task, "dev"):
        prompt, answer = tokenizer([example.prompt, example.answer])["input_ids"]
        assert tokenizer(example.prompt + example.answer)["input_ids"] == prompt + answer


def test_special_tokens_are_distinct_and_never_added(tokenizer: PreTrainedTokenizerFast) -> None:
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3 and None not in special
    assert not special & set(tokenizer("Question: 1+1?")["input_ids"])


def test_the_code_teacher_has_one_token_more(tokenizer: PreTrainedTokenizerFast) -> None:
    code = AutoTokenizer.from_pretrained(zoo.path("zoo/code-teacher"))
    ours, theirs = tokenizer.get_vocab(), code.get_vocab()
    assert len(theirs) == len(ours) + 1
    assert ours.items() <= theirs.items()


def test_teacher_and_student_share_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    student = AutoTokenizer.from_pretrained(zoo.path("zoo/student"))
    assert student.get_vocab() == tokenizer.get_vocab()
