"""What is made ahead is what is made on the spot; rows of a GPU, where there is one, are those of
main memory.
"""

from __future__ import annotations

import functools
import threading

import pytest
import torch

from semalign.stages.copies import Ahead, Fetched, behind, joined, sent
from semalign.stages.mapping import selected

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def test_a_thread_makes_what_is_begun_and_nothing_else() -> None:
    ahead, makers = Ahead[int](), []

    def total(examples: list[int]) -> int:
        makers.append(threading.current_thread() is threading.main_thread())
        return sum(examples)

    ahead.begin(total, [1, 2])
    assert ahead.take(total, [1, 2]) == 3 and makers == [False]
    assert ahead.take(total, [1, 2]) == 3 and makers == [False, True]
    ahead.begin(total, [4])
    assert ahead.take(total, [1, 2]) == 3 and makers[-1]


def test_an_error_of_the_thread_is_raised_where_its_result_is_used() -> None:
    ahead = Ahead[float]()
    ahead.begin(lambda examples: 1 / examples[0], [0])
    with pytest.raises(ZeroDivisionError):
        ahead.take(lambda examples: 1.0, [0])


def test_things_are_done_behind_in_order_and_all_before_the_end() -> None:
    done: list[tuple[int, bool]] = []

    def do(number: int) -> None:
        done.append((number, threading.current_thread() is threading.main_thread()))

    with behind() as begin:
        for number in range(5):
            begin(functools.partial(do, number))
            assert len(done) >= number  # one at most is not done yet
    assert done == [(number, False) for number in range(5)]


def test_an_error_behind_is_raised_by_the_next_or_at_the_end() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), behind() as begin:
        begin(fail)
    with behind() as begin:
        begin(fail)
        with pytest.raises(ZeroDivisionError):
            begin(fail)


@pytest.mark.parametrize("name", DEVICES)
def test_rows_go_to_a_device_and_back(name: str) -> None:
    device = torch.device(name)
    parts = [torch.randn(n, 3).to(torch.bfloat16) for n in (2, 1, 4)]
    there = sent(joined(parts, device), device)
    assert there.device.type == name
    assert torch.equal(Fetched(there).wait(), torch.cat(parts))


def test_all_columns_in_order_are_the_tensor_itself() -> None:
    tensor = torch.randn(2, 3)
    assert selected(tensor, 1, torch.arange(3)) is tensor
    for ids in ([0, 1], [2, 1, 0]):
        assert torch.equal(selected(tensor, 1, torch.tensor(ids)), tensor[:, ids])
    assert torch.equal(selected(tensor, 0, torch.tensor([1])), tensor[[1]])
