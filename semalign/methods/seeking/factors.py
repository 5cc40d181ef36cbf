"""Seeking: LoRA factors for a student from the most sensitive blocks of its teacher's matrices.

Zhong et al., "Seeking Neural Nuggets" (ICLR 2024), as their code does it; where that and SemAlign's
appendix B.1 differ, docs/seeking.md tells which is meant. Layers are numbered from 0; a matrix of
the teacher is n_t x m_t, the student's n_s x m_s, V is a vocabulary, r the rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from semalign.config.sections import Seeking
from semalign.core.losses import supervised_cross_entropy
from semalign.errors import UserError
from semalign.files import writing
from semalign.methods.checks import check_model
from semalign.models.decoder import Decoder, find_decoder, logits, run_base
from semalign.models.injection import VOCABULARY, FactorPair, Site, find_modules
from semalign.models.shapes import skeleton

_NOTE = "seeking"  # the file's one metadata key: several would come out in any order


class Supervised(Protocol):
    """Token ids, and the positions whose next token is of the answer."""

    @property
    def ids(self) -> tuple[int, ...]: ...

    @property
    def supervised_positions(self) -> slice: ...


class Window(NamedTuple):
    """Top left corner of a block, and the sum of what is in it."""

    row: int
    column: int
    sum: float


def sensitivity(
    model: nn.Module, examples: Sequence[Supervised], modules: Iterable[str]
) -> dict[str, Tensor]:
    """Sum over examples of |theta * dL/dtheta| by parameter name, L the mean cross-entropy of the
    answer, one example at a time.

    In the parameter's shape for the weights of `modules`, in float32 (float64 for a float64 model)
    on its device; for all other parameters of the layers only their total. Tied weights have one
    sensitivity under two names.

    Cost an example: 6 operations a weight and token. Memory: the weights, these sums, one gradient
    (each is added up and freed as soon as it is there), the activations of one example.

    **Raises** `UserError` if no example has an answer, and as `check_model` does. Leaves the model
    as it was.
    """
    answered = [e for e in examples if range(len(e.ids))[e.supervised_positions]]
    if not answered:
        raise UserError(
            "data.attribution_split: no example with an answer; Seeking needs at least one"
        )
    decoder = find_decoder(model)
    check_model(decoder)
    paths = find_modules(model, modules).values()
    whole = {model.get_submodule(path).weight for path in paths}
    totals = {
        p: p.new_zeros(p.shape, dtype=_wide(p))
        if p in whole
        else p.new_zeros((), dtype=torch.float64)
        for p in {*decoder.layers.parameters(), *whole}
    }
    with _folding(totals):
        for example in answered:
            _answer_loss(decoder, example).backward()
    named = model.named_parameters(remove_duplicate=False)
    return {name: totals[p] for name, p in named if p in totals}


@contextmanager
def _folding(totals: dict[Any, Tensor]) -> Iterator[None]:
    """Within the context each gradient goes into its parameter's total, and is freed at once."""

    def fold(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        product = parameter.grad.to(_wide(parameter)).mul_(parameter.detach()).abs_()
        parameter.grad = None
        total = totals[parameter]
        total.add_(product if total.shape == product.shape else product.sum(dtype=total.dtype))

    with ExitStack() as undo, torch.enable_grad():
        for parameter in totals:
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_()
            undo.callback(parameter.register_post_accumulate_grad_hook(fold).remove)
        yield


def _answer_loss(decoder: Decoder, example: Supervised) -> Tensor:
    ids, where = torch.tensor([example.ids]), example.supervised_positions
    scores = logits(decoder, run_base(decoder, ids, torch.ones_like(ids))[0, where])
    return supervised_cross_entropy(scores, ids[0].roll(-1)[where].to(scores.device))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def layer_sensitivities(model: nn.Module, sensitivities: dict[str, Tensor]) -> list[float]:
    """Sensitivity of each decoder layer: the sum over all its parameters, norms included."""
    names = {p: name for name, p in model.named_parameters()}
    return [
        math.fsum(
            sensitivities[names[p]].sum(dtype=torch.float64).item() for p in layer.parameters()
        )
        for layer in find_decoder(model).layers
    ]


def top_layers(scores: Sequence[float], count: int) -> list[int]:
    """The `count` layers of the largest score, by index; of equals the shallower.

    **Raises** `UserError` if there are fewer layers, or a score is not finite.
    """
    if not 1 <= count <= len(scores):
        raise UserError(f"seeking.layers: {count} were asked for, the teacher has 1..{len(scores)}")
    if not all(math.isfinite(score) for score in scores):
        raise UserError("seeking: sensitivities are not finite; try dtype float32 or bfloat16")
    return sorted(sorted(range(len(scores)), key=lambda layer: -scores[layer])[:count])


def best_window(scores: Tensor, shape: tuple[int, int]) -> Window:
    """The contiguous block of `shape` with the largest sum of scores (n_t, m_t); of equals the
    first, row by row.

    By a summed-area table in float64: about 6 n_t m_t operations, whatever the block's size.
    Sums of float32 scores of one magnitude are exact in it, so that equals are equal.

    **Raises** `UserError` if the block is larger than the matrix, or a score is not finite.
    """
    (n, m), (rows, columns) = scores.shape, shape
    if not (1 <= rows <= n and 1 <= columns <= m):
        raise UserError(f"seeking: no block of {rows} x {columns} in a matrix of {n} x {m}")
    table = torch.zeros(n + 1, m + 1, dtype=torch.float64, device=scores.device)
    table[1:, 1:] = scores
    table[1:, 1:].cumsum_(0).cumsum_(1)
    if not table[-1, -1].isfinite():
        raise UserError("seeking: sensitivities are not finite; try dtype float32 or bfloat16")
    below, above = table[rows:], table[:-rows]
    sums = below[:, columns:] - below[:, :-columns] - above[:, columns:] + above[:, :-columns]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    return Window(row, column, sums[row, column].item())


def low_rank(block: Tensor, rank: int) -> FactorPair:
    """B (n, r) and A (r, m) with BA the best approximation of a block (n, m) by rank r: of its SVD
    the r largest singular values, all in B. r is clipped at min(n, m).

    Reduced SVD in float32 (float64 for float64): for n >= m about 6 n m^2 + 20 m^3 operations.
    """
    u, s, vh = torch.linalg.svd(block.to(_wide(block)), full_matrices=False)
    return (u[:, :rank] * s[:rank]).contiguous(), vh[:rank].contiguous()


@dataclass(frozen=True, kw_only=True)
class Factors:
    """(B, A) by module path of the student (as models/injection.py reads them), on the CPU.

    layers: of the teacher, kept, from 0. windows: of each module, in the teacher's matrix; of the
    vocabulary's only the column means something. blocks: the student-sized blocks themselves, in
    the teacher's dtype, where `subtract` is `block`.
    """

    pairs: dict[str, FactorPair]
    layers: tuple[int, ...]
    windows: dict[str, Window]
    blocks: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """One safetensors file, whole or not there; equal factors give equal bytes."""
        tensors = {f"{name}.B": b for name, (b, _) in self.pairs.items()}
        tensors |= {f"{name}.A": a for name, (_, a) in self.pairs.items()}
        tensors |= {f"{name}.block": block for name, block in self.blocks.items()}
        note = json.dumps({"layers": self.layers, "windows": self.windows}, sort_keys=True)
        with writing(Path(path)) as partial:
            save_file(tensors, partial, metadata={_NOTE: note})

    @classmethod
    def load(cls, path: str | Path) -> Factors:
        """What `save` wrote. **Raises** `UserError` for a missing file, or one of anything else."""
        try:
            with safe_open(str(path), framework="pt") as file:
                note = json.loads((file.metadata() or {})[_NOTE])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"{path}: no file of Seeking's factors ({type(error).__name__})"
            ) from None
        windows = {name: Window(*window) for name, window in note["windows"].items()}
        return cls(
            pairs={name: (tensors[f"{name}.B"], tensors[f"{name}.A"]) for name in windows},
            layers=tuple(note["layers"]),
            windows=windows,
            blocks={n: tensors[f"{n}.block"] for n in windows if f"{n}.block" in tensors},
        )


def seek(
    teacher: nn.Module,
    student_config: Any,
    examples: Sequence[Supervised],
    settings: Seeking,
    shared: tuple[Tensor, Tensor],
    *,
    trust_remote_code: bool = False,
) -> Factors:
    """Factors for the student of `student_config` (its weights are not read): student layer i takes
    from the i-th of the kept teacher layers, and each matrix has a window of its own.

    `examples` are in the teacher's ids. `shared`: (student ids, teacher ids) of the tokens that
    both have (models.loading.Overlap). Of `embed_tokens` and `lm_head` only these rows are looked
    at, the window is along the width, and other rows of the student get zero. With
    `settings.layers` below the student's number of layers its deeper ones are left alone.

    Cost: `sensitivity`, and a summed-area table and an SVD for each matrix, one at a time, on the
    teacher's device.

    **Raises** `UserError` naming the matrix and both shapes if one of the student's is larger, and
    as `sensitivity` does.
    """
    student = skeleton(student_config, trust_remote_code=trust_remote_code)
    count, ours, theirs = check_fit(student, teacher, settings, len(shared[0]))
    shapes = {site: tuple(student.get_submodule(path).weight.shape) for site, path in ours.items()}
    sums = sensitivity(teacher, examples, settings.modules)
    kept = top_layers(layer_sensitivities(teacher, sums), count)
    pairs, windows, blocks = {}, {}, {}
    for (layer, name), path in ours.items():
        source = _path(theirs, (None if layer is None else kept[layer], name))
        weight = teacher.get_submodule(source).weight.detach()
        scores, shape = sums[f"{source}.weight"], shapes[layer, name]
        if layer is None:
            windows[path], block = _vocabulary_block(weight, scores, shape, shared)
            b, a = _vocabulary_factors(block, shared[0], settings.rank, name)
        else:
            windows[path] = best_window(scores, shape)
            block = _cut(weight, windows[path], shape)
            b, a = low_rank(block, settings.rank)
        pairs[path] = (b.cpu(), a.cpu())
        if settings.subtract == "block":
            blocks[path] = block.cpu().contiguous()
    return Factors(pairs=pairs, layers=tuple(kept), windows=windows, blocks=blocks)


def check_fit(
    student: nn.Module, teacher: nn.Module, settings: Seeking, shared: int
) -> tuple[int, dict[Site, str], dict[Site, str]]:
    """The number of layers, and the matrices of both models; looks at shapes alone.

    `shared`: how many tokens both have. **Raises** `UserError` as `seek` does for the shapes.
    """
    count = _layer_count(student, teacher, settings)
    ours = find_modules(student, settings.modules, layers=count)
    theirs = find_modules(teacher, settings.modules)
    for site, path in ours.items():
        shape = tuple(student.get_submodule(path).weight.shape)
        _check_fits(path, shape, teacher.get_submodule(_path(theirs, site)), shared)
    return count, ours, theirs


def _layer_count(student: nn.Module, teacher: nn.Module, settings: Seeking) -> int:
    ours, theirs = (len(find_decoder(model).layers) for model in (student, teacher))
    count = settings.layers or ours
    if count > min(ours, theirs):
        raise UserError(
            f"seeking.layers={count}: the student has {ours} layers and the teacher {theirs}; "
            f"expected 1..{min(ours, theirs)}"
        )
    return count


def _path(sites: dict[Site, str], site: Site) -> str:
    if site not in sites:
        raise UserError(f"seeking: the teacher has no {site[1]}; expected models of one family")
    return sites[site]


def _check_fits(path: str, shape: tuple[int, int], theirs: nn.Module, shared: int) -> None:
    """Before the teacher is run: all its layers are of one shape."""
    n, m = theirs.weight.shape
    if path.split(".")[-1] in VOCABULARY:
        if not shared:
            raise UserError(f"seeking: {path} needs tokens that both vocabularies have; none is")
        n = max(n, shape[0])  # matched row by row, not by a window
    if shape[0] > n or shape[1] > m:
        raise UserError(
            f"seeking: the student's {path} is {shape[0]} x {shape[1]}, the teacher's {n} x {m}; "
            "expected a teacher that is at least as large"
        )


def _cut(weight: Tensor, window: Window, shape: tuple[int, int]) -> Tensor:
    (row, column, _), (rows, columns) = window, shape
    return weight[row : row + rows, column : column + columns]


def _vocabulary_block(
    weight: Tensor, scores: Tensor, shape: tuple[int, int], shared: FactorPair
) -> tuple[Window, Tensor]:
    """The best columns over the shared rows of (V_t, m_t), at the student's rows of (V_s, m_s)."""
    ours, theirs = (ids.to(weight.device) for ids in shared)
    by_column = scores[theirs].sum(dim=0, keepdim=True, dtype=torch.float64)
    window = best_window(by_column, (1, shape[1]))
    block = weight.new_zeros(shape)
    block[ours] = _cut(weight[theirs], window, (len(theirs), shape[1]))
    return window, block


def _vocabulary_factors(block: Tensor, ids: Tensor, rank: int, name: str) -> FactorPair:
    """Of an embedding the transpose's; rows that are not shared are zero to the bit."""
    ids = ids.to(block.device)
    if name == "embed_tokens":
        b, shared = low_rank(block[ids].T, rank)
        a = shared.new_zeros(len(shared), len(block))
        a[:, ids] = shared
        return b, a
    shared, a = low_rank(block[ids], rank)
    b = shared.new_zeros(len(block), shared.shape[1])
    b[ids] = shared
    return b, a
