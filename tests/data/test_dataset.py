"""Examples in a few arrays: each comes back as it was, and what is counted of them is right."""

from __future__ import annotations

import pickle
import random

import pytest

from semalign.data.dataset import Dataset
from semalign.data.tokens import Aligned, Tokens, count_positions, fingerprint


def examples(count: int = 40) -> list[Tokens]:
    """Of several lengths; some without a label, some aligned at a part of their positions."""
    draw, made = random.Random(0), []
    for n in range(count):
        length = draw.randrange(2, 30)
        prompt = length if n % 7 == 0 else draw.randrange(1, length)
        ids = tuple(draw.randrange(2**17) for _ in range(length))
        aligned = None
        if n % 3 == 0:
            every = tuple(sorted(draw.sample(range(length + 3), length)))  # some beyond its end
            aligned = Aligned(every, tuple(p for p in every if p >= prompt - 1))
        made.append(Tokens(f"Beispiel/ü{n}", ids, prompt, aligned))
    return made


def test_examples_come_back_as_they_were() -> None:
    rows = examples()
    found = Dataset(rows)
    assert list(found) == rows and len(found) == len(rows)
    assert found[-1] == rows[-1] and found[3:9] == rows[3:9]
    with pytest.raises(IndexError):
        found[len(rows)]
    assert found.key == fingerprint(rows)


def test_counts_are_those_of_the_examples() -> None:
    rows = examples()
    found = Dataset(rows)
    assert found.length == sum(len(row.ids) for row in rows)
    assert found.longest == max(len(row.ids) for row in rows)
    supervised = [count_positions(row.supervised_positions) for row in rows]
    assert found.supervised == sum(supervised)
    for count in (0, 1, 5, 400):
        assert found.most_supervised(count) == sum(sorted(supervised, reverse=True)[:count])
    for name in ("all", "answer"):
        expected = [count_positions(row.align_positions(name)) for row in rows]
        assert found.positions(name).tolist() == expected


def test_no_examples_are_a_dataset_too() -> None:
    none = Dataset([])
    assert (list(none), none.length, none.longest, none.supervised) == ([], 0, 0, 0)
    assert none.most_supervised(8) == 0 and none.positions("all").tolist() == []


def test_what_is_sent_to_workers_is_buffers() -> None:
    """Ray maps buffers into the memory of its workers; what is within the pickle they copy."""
    sizes = []
    for count in (10, 1000):
        rows, buffers = Dataset(examples(count)), list[pickle.PickleBuffer]()
        rows.positions("all")  # kept with it
        sizes.append(len(pickle.dumps(rows, protocol=5, buffer_callback=buffers.append)))
        assert sum(len(buffer.raw()) for buffer in buffers) > 4 * rows.length
    assert sizes[1] < 1.1 * sizes[0] < 5000
