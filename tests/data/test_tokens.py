"""Token ids and the positions that each loss looks at."""

from __future__ import annotations

from pathlib import Path

import pytest

from semalign.data.batches import length_buckets, pad, position_mask
from semalign.data.tokens import Tokens, fingerprint, tokenise
from semalign.errors import UserError
from semalign.models.loading import load_tokenizer
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
