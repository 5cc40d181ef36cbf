"""The alternatives to the cosine (fisher, geometry) and the divergence at the output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from semalign.core.losses import chunked_sum, fisher_sum, geometry_sum, kl_divergence_sum
from semalign.core.similarity import linear_cka
from tests.reference import losses as reference

WIDTH, TEACHER_WIDTH, VOCABULARY = 7, 9, 11


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


HEAD, TEACHER_HEAD = random(VOCABULARY, WIDTH, seed=6), random(VOCABULARY, TEACHER_WIDTH, seed=7)
ROWS, TEACHER_ROWS = random(10, WIDTH, seed=8), random(10, TEACHER_WIDTH, seed=9)
LOGITS, TEACHER_LOGITS = random(15, VOCABULARY, seed=2), random(15, VOCABULARY, seed=3)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    return found


@pytest.mark.parametrize("chunk", [1, 4, 10, 256])
def test_fisher_equals_the_quadratic_form_written_out(chunk: int) -> None:
    found = fisher_sum(ROWS, TEACHER_ROWS, HEAD, TEACHER_HEAD, chunk=chunk)
    expected = reference.fisher(ROWS, TEACHER_ROWS, HEAD, TEACHER_HEAD)
    assert found.item() / len(ROWS) == pytest.approx(expected)


def test_fisher_gradient_is_the_metric_times_the_difference() -> None:
    """d/dh = W_S^T (diag p - p p^T) (z - z*), whatever the chunk."""
    z, z_target = ROWS @ HEAD.T, TEACHER_ROWS @ TEACHER_HEAD.T
    p = z_target.softmax(dim=-1)
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nij,nj->ni", metric, z - z_target) @ HEAD
    for chunk in (3, 256):
        found = gradient(
            lambda h, chunk=chunk: fisher_sum(h, TEACHER_ROWS, HEAD, TEACHER_HEAD, chunk=chunk),
            ROWS,
        )
        torch.testing.assert_close(found, expected)


def test_fisher_is_the_second_order_of_kl() -> None:
    """At z = z* + t d both vanish like t^2, and their ratio goes to 1 as fast as t."""
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    target, direction = random(4, VOCABULARY, seed=10), random(4, VOCABULARY, seed=11)
    errors = []
    for t in (1e-2, 1e-3, 1e-4):
        z = target + t * direction
        ratio = fisher_sum(z, target, identity, identity) / kl_divergence_sum(z, target)
        errors.append(abs(ratio.item() - 1))
    assert errors[2] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)


def test_fisher_knows_no_shift_of_the_logits() -> None:
    """A softmax does not, either: z + c is as good as z."""
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    expected = fisher_sum(LOGITS, TEACHER_LOGITS, identity, identity)
    found = fisher_sum(LOGITS + 50, TEACHER_LOGITS - 3, identity, identity)
    torch.testing.assert_close(found, expected)


def test_fisher_by_hand() -> None:
    # z* = (0, 0), p = (1/2, 1/2), z = (2, 0): half the variance of {2, 0} is 1/2
    eye = torch.eye(2)
    assert fisher_sum(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), eye, eye).item() == 0.5


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_fisher_makes_and_keeps_no_more_than_a_chunk_of_logits() -> None:
    """Neither V x V nor N x V, forward or backward; nothing of width V waits for the backward."""
    n, v, chunk = 40, 64, 4
    h = random(n, 3).requires_grad_()
    head = random(v, 3)
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = fisher_sum(h, random(n, 3, seed=1), head, head, chunk=chunk)
        assert not [shape for shape in kept if v in shape]
        loss.backward()
    assert sizes.largest == chunk * v


def test_geometry_equals_one_minus_cka_of_the_gram_matrices() -> None:
    h, target = random(3, 5, WIDTH, seed=16), random(3, 5, TEACHER_WIDTH, seed=12)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    where = mask.bool()
    found = geometry_sum(h[where], target[where], [3, 5, 1])
    assert found.item() / 2 == pytest.approx(reference.geometry(h, target, mask))
    first = geometry_sum(h[0, :3], target[0, :3], [3])
    torch.testing.assert_close(first, 1 - linear_cka(h[0, :3], target[0, :3]))


def test_geometry_knows_no_rotation_scale_or_shift() -> None:
    rotation, _ = torch.linalg.qr(random(WIDTH, WIDTH, seed=13))
    moved = 7 * ROWS @ rotation + 3
    assert geometry_sum(moved, ROWS, [6, 4]).item() == pytest.approx(0, abs=1e-9)
    apart = geometry_sum(torch.cat([moved[:6], -2 * moved[6:]]), ROWS, [6, 4])
    assert apart.item() == pytest.approx(0, abs=1e-9)  # each sequence by itself
    assert geometry_sum(ROWS, TEACHER_ROWS, [6, 4]).item() > 0.1


def test_geometry_of_short_sequences_is_nothing() -> None:
    h = ROWS.clone().requires_grad_()
    loss = geometry_sum(h, TEACHER_ROWS, [1, 8, 0, 1])
    torch.testing.assert_close(loss, geometry_sum(ROWS[1:9], TEACHER_ROWS[1:9], [8]))
    loss.backward()
    assert h.grad is not None
    assert h.grad[[0, 9]].abs().sum() == 0 and h.grad[1:9].abs().sum() > 0
    assert geometry_sum(ROWS[:0], TEACHER_ROWS[:0], []).item() == 0


def test_kl_equals_its_definition() -> None:
    student, teacher = LOGITS, TEACHER_LOGITS
    found = kl_divergence_sum(student, teacher)
    assert found.item() / len(student) == pytest.approx(reference.kl_divergence(student, teacher))
    assert kl_divergence_sum(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-12)
    # its gradient is softmax(student) - softmax(teacher)
    torch.testing.assert_close(
        gradient(lambda z: kl_divergence_sum(z, teacher), student),
        student.softmax(dim=-1) - teacher.softmax(dim=-1),
    )


def test_kl_of_logits_far_apart_is_finite() -> None:
    far = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = kl_divergence_sum(far, -far)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert far.grad is not None and far.grad.isfinite().all()


def test_sums_over_parts_are_the_sums() -> None:
    whole = fisher_sum(ROWS, TEACHER_ROWS, HEAD, TEACHER_HEAD)
    parts = [
        fisher_sum(ROWS[cut], TEACHER_ROWS[cut], HEAD, TEACHER_HEAD)
        for cut in (slice(0, 3), slice(3, 10))
    ]
    torch.testing.assert_close(sum(parts), whole)
    parts = [
        geometry_sum(ROWS[:6], TEACHER_ROWS[:6], [6]),
        geometry_sum(ROWS[6:], TEACHER_ROWS[6:], [4]),
    ]
    torch.testing.assert_close(sum(parts), geometry_sum(ROWS, TEACHER_ROWS, [6, 4]))
    rows, teacher = LOGITS, TEACHER_LOGITS
    parts = [kl_divergence_sum(rows[:4], teacher[:4]), kl_divergence_sum(rows[4:], teacher[4:])]
    torch.testing.assert_close(sum(parts), kl_divergence_sum(rows, teacher))
    chunked = chunked_sum(kl_divergence_sum, rows, teacher, chunk=4)
    torch.testing.assert_close(chunked, kl_divergence_sum(rows, teacher))


def test_no_gradient_enters_the_teacher() -> None:
    teacher = TEACHER_ROWS.clone().requires_grad_()
    h = ROWS.clone().requires_grad_()
    loss = fisher_sum(h, teacher, HEAD, TEACHER_HEAD) + geometry_sum(h, teacher, [10])
    loss = loss + kl_divergence_sum(h @ HEAD.T, teacher @ TEACHER_HEAD.T)
    loss.backward()
    assert teacher.grad is None
    assert h.grad is not None and h.grad.abs().sum() > 0


def test_bfloat16_inputs_accumulate_in_float32() -> None:
    h, target = (random(600, 8, seed=seed).to(torch.bfloat16) for seed in (14, 15))
    identity = torch.eye(8, dtype=torch.bfloat16)
    for loss in (
        lambda a, b: fisher_sum(a, b, identity.to(a.dtype), identity.to(a.dtype)),
        lambda a, b: geometry_sum(a, b, [200, 400]),
        kl_divergence_sum,
    ):
        found = loss(h, target)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(h.float(), target.float()))
