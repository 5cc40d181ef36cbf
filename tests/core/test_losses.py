from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from semalign.core.losses import (
    cosine_alignment_loss,
    cosine_sum,
    cross_entropy_sum,
    masked_mean,
    supervised_cross_entropy,
    transfer_loss,
)
from tests.reference import losses as reference

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 5, 7, 11


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


H, TARGET = random(BATCH, LENGTH, WIDTH), random(BATCH, LENGTH, WIDTH, seed=1)
LOGITS = random(BATCH, LENGTH, VOCABULARY, seed=2)
LABELS = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCABULARY
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
OMEGA = [1, 2, 4]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool])
def test_cosine_loss_equals_equation_3(dtype: torch.dtype) -> None:
    found = cosine_alignment_loss(H, TARGET, MASK.to(dtype))
    assert found.item() == pytest.approx(reference.cosine_alignment_loss(H, TARGET, MASK))


def test_cross_entropy_equals_equation_4() -> None:
    found = supervised_cross_entropy(LOGITS[:, OMEGA].flatten(0, 1), LABELS[:, OMEGA].flatten())
    expected = reference.supervised_cross_entropy(LOGITS, LABELS, OMEGA)
    assert found.item() == pytest.approx(expected)


def test_sums_over_parts_give_the_means() -> None:
    h, target = H[MASK.bool()], TARGET[MASK.bool()]
    total = cosine_sum(h[:4], target[:4]) + cosine_sum(h[4:], target[4:])
    torch.testing.assert_close(1 - total / len(h), cosine_alignment_loss(H, TARGET, MASK))
    rows, labels = LOGITS.flatten(0, 1), LABELS.flatten()
    total = cross_entropy_sum(rows[:4], labels[:4]) + cross_entropy_sum(rows[4:], labels[4:])
    torch.testing.assert_close(total / len(rows), supervised_cross_entropy(rows, labels))


def test_total_loss_equals_equation_5() -> None:
    terms = {"alignment": 0.25, "cross_entropy": 2.0, "divergence": 0.5}
    expected = reference.transfer_loss(0.25, 2.0, 0.5, 0.3, 1.5, 0.7)
    assert transfer_loss(**terms, alpha=0.3, beta=1.5, gamma=0.7) == pytest.approx(expected)
    tensors = {name: torch.tensor(value) for name, value in terms.items()}
    found = transfer_loss(**tensors, alpha=0.3, beta=1.5, gamma=0.7)
    assert found.item() == pytest.approx(expected)
    del tensors["divergence"]
    papers = transfer_loss(**tensors, alpha=0.3, beta=1.5, gamma=0.0)
    assert papers.item() == pytest.approx(reference.transfer_loss(0.25, 2.0, 0.0, 0.3, 1.5, 0.0))


def test_values_by_hand() -> None:
    h = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]]])
    target = torch.tensor([[[6.0, 8.0], [0.0, 2.0], [-1.0, -1.0]]])
    # cosines 1, 0, -1
    assert cosine_alignment_loss(h, target, torch.tensor([[1, 1, 1]])).item() == 1
    assert cosine_alignment_loss(h, target, torch.tensor([[1, 0, 0]])).item() == pytest.approx(0)
    assert cosine_alignment_loss(h, target, torch.tensor([[1, 1, 0]])).item() == 0.5
    uniform = torch.zeros(2, 8)
    found = supervised_cross_entropy(uniform, torch.tensor([0, 7])).item()
    assert found == pytest.approx(math.log(8))


def test_nothing_to_average() -> None:
    assert masked_mean(H[..., 0], torch.zeros(BATCH, LENGTH)).item() == 0
    assert cosine_alignment_loss(H, TARGET, torch.zeros(BATCH, LENGTH)).item() == 1
    empty = supervised_cross_entropy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert empty.item() == 0


def test_padding_cannot_poison_the_mean() -> None:
    h = H.clone()
    h[MASK == 0] = float("nan")
    assert cosine_alignment_loss(h, TARGET, MASK).item() == pytest.approx(
        cosine_alignment_loss(H, TARGET, MASK).item()
    )


def test_gradient_reaches_h_where_the_mask_is_set_and_never_the_target() -> None:
    h, target = H.clone().requires_grad_(), TARGET.clone().requires_grad_()
    (cosine_alignment_loss(h, target, MASK) + cosine_sum(h[0], target[0])).backward()
    assert target.grad is None
    assert h.grad is not None
    assert h.grad[0].abs().sum() > 0
    assert h.grad[1:][MASK[1:] == 0].abs().sum() == 0


def test_zero_vectors_give_finite_values_and_gradients() -> None:
    h = torch.zeros(1, 1, 4, requires_grad=True)
    loss = cosine_alignment_loss(h, torch.ones(1, 1, 4), torch.ones(1, 1))
    loss.backward()
    assert loss.item() == 1
    assert h.grad is not None and h.grad.isfinite().all()


def test_bfloat16_inputs_accumulate_in_float32() -> None:
    h, target = (random(4, 500, 8, seed=seed).to(torch.bfloat16) for seed in (3, 4))
    mask = torch.ones(4, 500)
    found = cosine_alignment_loss(h, target, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cosine_alignment_loss(h.float(), target.float(), mask))
    logits = random(500, 9, seed=5).to(torch.bfloat16)
    labels = torch.arange(500) % 9
    found = cross_entropy_sum(logits, labels)
    torch.testing.assert_close(found, cross_entropy_sum(logits.float(), labels))


def test_shapes_are_checked_in_tests() -> None:
    with pytest.raises(TypeError, match="target"):
        cosine_sum(torch.zeros(3, 4), torch.zeros(3, 5))
