"""LaTen's hypernetwork: the teacher's neurons translated to what is added to the student's.

The added weights (deltas) touch some rows of up_proj and v_proj, some columns of down_proj and
o_proj, and are kept as those alone: never as a matrix of the module's size. D_T, D_S widths, n
neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semalign.methods.laten.neurons import Located
from semalign.methods.laten.trace import PROJECTIONS, Kind, projection, value_rows
from semalign.models.decoder import Decoder

_IN_ROWS = ("up_proj", "v_proj")
_INIT_STD = 1e-5
_KIND: dict[str, Kind] = {
    name: "ffn" if parent == "mlp" else "attn" for name, parent in PROJECTIONS.items()
}


class Translator(nn.Module):
    """The MLP of one module name, D_T -> D_T -> ReLU -> D_S without biases, in float32."""

    def __init__(self, teacher_width: int, student_width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(teacher_width, teacher_width))
        self.second = nn.Parameter(torch.empty(student_width, teacher_width))

    def forward(self, vectors: Tensor) -> Tensor:
        return F.linear(F.linear(vectors, self.first).relu(), self.second)


def hypernetwork(teacher_width: int, student_width: int) -> nn.ModuleDict:
    """g: a translator for each module name, for all layers and neurons, not initialised.

    Of 13B to 7B (5120, 4096) 188,743,680 parameters.
    """
    return nn.ModuleDict({name: Translator(teacher_width, student_width) for name in PROJECTIONS})


def initialise(net: nn.Module, seed: int) -> None:
    """All parameters ~ N(0, 1e-5 squared), drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * _INIT_STD)


@dataclass(frozen=True)
class Move:
    """Where the vectors `source_index` of the teacher's module `source` go: to `index` of the
    student's module `name` of `layer` (0-based), the i-th to the i-th. Indices are of rows for up
    and v, of columns for down and o.
    """

    layer: int
    name: str
    index: Tensor
    source: nn.Linear
    source_index: Tensor

    def vectors(self, like: Tensor) -> Tensor:
        """(n, D_T) of the teacher's weight, with the dtype and on the device of `like`."""
        at = self.source_index.to(self.source.weight.device)
        weight = self.source.weight.detach()
        found = weight[at] if self.name in _IN_ROWS else weight[:, at].T
        return found.to(like)


def moves(
    teacher: Decoder, student: Decoder, teacher_neurons: Located, student_neurons: Located
) -> list[Move]:
    """All moves from the located neurons of the teacher to those of the student.

    Chosen layers are paired in their order, neurons by rank.
    """
    return [
        Move(
            layer=ours,
            name=name,
            index=_index(student, name, student_neurons[kind].chosen[rank]),
            source=projection(teacher, theirs, name),
            source_index=_index(teacher, name, teacher_neurons[kind].chosen[rank]),
        )
        for name, kind in _KIND.items()
        for rank, (theirs, ours) in enumerate(
            zip(teacher_neurons[kind].layers, student_neurons[kind].layers, strict=True)
        )
    ]


def _index(decoder: Decoder, name: str, neurons: Tensor) -> Tensor:
    """Neurons as rows or columns of the module; of v several may share a row."""
    return value_rows(decoder, neurons) if name == "v_proj" else neurons


@dataclass(frozen=True)
class Delta:
    """Added to one module of the student: value (n, D_S), to its rows (up, v) or columns (down, o)
    `index`. Where a row is named more than once, its values add up.
    """

    layer: int
    name: str
    index: Tensor
    value: Tensor

    def to(self, device: torch.device | str) -> Delta:
        value = self.value.detach().to(device)
        return replace(self, index=self.index.to(device), value=value)


def translate(net: nn.ModuleDict, wanted: Sequence[Move]) -> list[Delta]:
    """g of every move's vectors. Cost: 2 n D_T (D_T + D_S) operations a move."""
    like = next(net.parameters())
    return [
        Delta(move.layer, move.name, move.index.to(like.device), net[move.name](move.vectors(like)))
        for move in wanted
    ]


def size_penalty(deltas: Sequence[Delta]) -> Tensor:
    """Sum over the four module names of the mean of squares of all that is added under the name."""
    total = deltas[0].value.new_zeros(())
    for name in PROJECTIONS:
        values = [delta.value for delta in deltas if delta.name == name]
        total = total + sum(v.square().sum() for v in values) / sum(v.numel() for v in values)
    return total


@contextmanager
def injected(decoder: Decoder, deltas: Sequence[Delta]) -> Iterator[None]:
    """Within the context the model runs with weights W + delta, and gradients reach the deltas.

    Adds 4 n D_S operations a token, layer and pair of modules; the weights are not touched. A delta
    is rounded to the activations' dtype.
    """
    with ExitStack() as hooks:
        for delta in deltas:
            module = projection(decoder, delta.layer, delta.name)
            hooks.callback(module.register_forward_hook(_adding(delta)).remove)
        yield


def _adding(delta: Delta) -> Any:
    """A hook that adds to a module's output; on its device, wherever the delta is."""
    index, summing = _each_once(delta.index)

    def rows(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        added = F.linear(args[0], delta.value.to(output))
        if summing is not None:
            added = added @ summing.to(output)
        return output.index_add(-1, index.to(output.device), added)

    def columns(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        selected = args[0].index_select(-1, index.to(output.device))
        return output + selected @ delta.value.to(output)

    return rows if delta.name in _IN_ROWS else columns


def _each_once(index: Tensor) -> tuple[Tensor, Tensor | None]:
    """The indices (m,) without repetition, and the (n, m) of ones and zeros that sums what belongs
    to one of them; the index itself and None if nothing is repeated. On a GPU a product has one
    order of summation, and index_add with repeated indices has any.
    """
    once, position = index.unique(return_inverse=True)
    if len(once) == len(index):
        return index, None
    return once, F.one_hot(position).float()


@torch.no_grad()
def add_to_weights(decoder: Decoder, deltas: Sequence[Delta]) -> None:
    """W += delta, in place."""
    for delta in deltas:
        weight = projection(decoder, delta.layer, delta.name).weight
        value, index = delta.value.to(weight), delta.index.to(weight.device)
        if delta.name in _IN_ROWS:
            weight.index_add_(0, index, value)
        else:
            weight.index_add_(1, index, value.T)
