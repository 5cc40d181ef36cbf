from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from semalign.core.attribution import aggregate, critical_layers, layer_scores
from semalign.errors import UserError
from tests.reference import attribution as reference


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


def small_network() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(*(Residual(6) for _ in range(4))).requires_grad_(False)
    return network, torch.randn(2, 5, 6)


def squared_error(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: (network(x)[:, -2:] - 1).pow(2).sum()


@pytest.mark.parametrize("how", ["abs_sum", "sum"])
@pytest.mark.parametrize("granularity", ["block", "inner"])
def test_scores_equal_one_layer_at_a_time(how: str, granularity: str) -> None:
    network, x = small_network()
    layers = [block if granularity == "block" else block.inner for block in network]
    found = layer_scores(squared_error(network), layers, x, aggregation=how)
    expected = [reference.layer_score(squared_error(network), each, x, how) for each in layers]
    assert found == pytest.approx(expected, rel=1e-5)


def test_scores_by_hand() -> None:
    # y = 3 (2 x), L = y_1 - y_2: dL/dh_1 = (3, -3) at h_1 = 2 x; dL/dh_2 = (1, -1) at h_2 = 6 x
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    first.weight.data, second.weight.data = 2 * torch.eye(2), 3 * torch.eye(2)
    x = torch.tensor([[[1.0, 5.0]]])

    def difference(x: Tensor) -> Tensor:
        y = second(first(x))
        return (y[..., 0] - y[..., 1]).sum()

    assert layer_scores(difference, [first, second], x, aggregation="sum") == [-24, -24]
    assert layer_scores(difference, [first, second], x, aggregation="abs_sum") == [36, 36]


def test_all_layers_take_one_forward_and_one_backward() -> None:
    network, x = small_network()
    calls: list[str] = []
    network[-1].register_forward_hook(lambda *_: calls.append("forward"))
    network[-1].register_full_backward_hook(lambda *_: calls.append("backward"))
    layer_scores(squared_error(network), list(network), x)
    assert calls == ["forward", "backward"]


def test_further_arguments_reach_the_forward() -> None:
    network, x = small_network()
    weight = torch.tensor(2.0)
    doubled = layer_scores(
        lambda x, factor: factor * squared_error(network)(x), list(network), x, args=(weight,)
    )
    plain = layer_scores(squared_error(network), list(network), x)
    assert doubled == pytest.approx([2 * score for score in plain])


def test_nothing_is_left_behind() -> None:
    network, x = small_network()
    layer_scores(squared_error(network), list(network), x)
    with pytest.raises(ZeroDivisionError):
        layer_scores(lambda x: network(x).sum() / (1 // 0), list(network), x)
    assert not any(module._forward_hooks for module in network.modules())
    assert not x.requires_grad and x.grad is None
    assert all(parameter.grad is None for parameter in network.parameters())


def test_aggregation() -> None:
    attribution = torch.tensor([[[1.0, -2.0], [3.0, -4.0]]])
    assert aggregate(attribution, "abs_sum") == 10
    assert aggregate(attribution, "sum") == -2
    with pytest.raises(UserError, match="did you mean 'abs_sum'"):
        aggregate(attribution, "abssum")


def test_critical_layers_by_magnitude_and_the_deeper_of_equals() -> None:
    assert critical_layers([1.0, -9.0, 3.0, 7.0], 2) == [1, 3]
    assert critical_layers([5.0, 2.0, -5.0, 5.0], 3) == [3, 2, 0]
    with pytest.raises(UserError, match=r"has 1\.\.2"):
        critical_layers([1.0, 2.0], 3)
    with pytest.raises(UserError, match="not finite"):
        critical_layers([1.0, float("nan")], 1)
