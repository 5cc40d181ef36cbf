"""Wrong labels are as many as asked, always wrong and always the same; hidden ones are gone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from semalign import zoo
from semalign.config.sections import Data
from semalign.data.dataset import Dataset
from semalign.data.labels import hide_labels, mislabel
from semalign.data.tokens import Tokens, fingerprint
from semalign.errors import UserError
from semalign.tasks import Example, load_split

MMLU = load_split(zoo.path("zoo/data"), "mmlu", "train")[:200]


def changed(found: list[Example], original: list[Example] = MMLU) -> list[int]:
    pairs = zip(original, found, strict=True)
    return [i for i, (a, b) in enumerate(pairs) if a.answer != b.answer]


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 0), (0.1, 20), (0.333, 67), (1.0, 200)])
def test_the_share_is_wrong_and_nothing_else_changes(noise: float, expected: int) -> None:
    found = mislabel(MMLU, Data(label_noise=noise))
    assert len(changed(found)) == expected
    for a, b in zip(MMLU, found, strict=True):
        assert replace(b, answer=a.answer) == a
    assert {example.answer for example in found} <= {example.answer for example in MMLU}


def test_only_labelled_examples_are_mislabelled() -> None:
    """And take their answers from one another: the others' are unknown."""
    found = mislabel(MMLU, Data(label_noise=0.5, labelled_limit=40))
    assert len(changed(found)) == 20 and max(changed(found)) < 40
    distinct = [replace(e, answer=str(i)) for i, e in enumerate(MMLU)]
    found = mislabel(distinct, Data(label_noise=1, labelled_limit=40))
    assert {int(example.answer) for example in found[:40]} <= set(range(40))


def test_the_same_ones_every_time_and_others_with_more_noise() -> None:
    first = mislabel(MMLU, Data(label_noise=0.2))
    assert mislabel(MMLU, Data(label_noise=0.2)) == first
    assert mislabel(MMLU, Data(label_noise=0.4)) != first


def test_labels_that_are_all_the_same_cannot_be_wrong() -> None:
    same = [replace(example, answer=" A") for example in MMLU[:3]]
    with pytest.raises(UserError, match=r"data.label_noise=0.5: all 3 labelled examples have"):
        mislabel(same, Data(label_noise=0.5))


def test_hidden_labels_are_gone() -> None:
    tokens = Dataset(Tokens(str(n), (1, 2, 3, 4 + n), 2) for n in range(4))
    seen = hide_labels(tokens, 2)
    assert seen[:2] == tokens[:2]
    assert [example.ids for example in seen[2:]] == [(1, 2), (1, 2)]
    assert [example.labelled for example in seen] == [True, True, False, False]
    assert hide_labels(tokens, None) is hide_labels(tokens, 9) is tokens
    assert fingerprint(seen) != fingerprint(tokens)
