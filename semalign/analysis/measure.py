"""The numbers behind the paper's figures: decomposition, similarity and attribution by layer.

D width, m atoms, N tokens (positions of all examples), L layers. Lists by layer begin with the
shallowest one, which people are shown as layer 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semalign.analysis.inputs import MODELS, Inputs
from semalign.config.jobs import AnalysisJob
from semalign.core.alignment import align, cosine_map, dual_map
from semalign.core.attribution import AGGREGATIONS, critical_layers
from semalign.core.bases import semantic_bases
from semalign.core.pairing import paper_number
from semalign.core.similarity import MinibatchCKA, linear_cka
from semalign.data.batches import pad
from semalign.data.tokens import Tokens
from semalign.errors import UserError
from semalign.models.adapters import load_adapter
from semalign.models.decoder import INTERFACES, capture, find_decoder, run_base, verify_structure
from semalign.models.vocabulary import Overlap
from semalign.stages.attribution import attribute
from semalign.stages.mapping import Transport

_BATCH_ROWS = 512  # of minibatch CKA

Load = Callable[[str], nn.Module]
Rows = list[Tensor]


def measure(job: AnalysisJob, inputs: Inputs, load: Load) -> dict[str, Any]:
    """The data of the figure, JSON values alone; `load` makes a model of a path.

    Cost: that of `decomposition`, `similarity` or `attribution`.
    """
    models = [load(getattr(job, name)) for name in MODELS[job.figure]]
    for model in models:
        _check(model, job)
    how = {"batch_size": job.batch_size}
    if job.figure == "decomposition":
        data = decomposition(models[0], inputs.tokens, seed=job.seed, **how)
    elif job.figure == "attribution":
        data = attribution(models[0], inputs.tokens, **how)
    else:
        assert inputs.overlap is not None
        data = similarity(
            *models,
            (inputs.teacher_tokens, inputs.tokens),
            _transport(job, models, inputs.overlap),
            adapter=job.adapter,
            positions=job.positions,
            seed=job.seed,
            **how,
        )
    about = {name: getattr(job, name) for name in (*MODELS[job.figure], "task", "split")}
    return {"figure": job.figure, **about, "examples": len(inputs.tokens), **data}


def _check(model: nn.Module, job: AnalysisJob) -> None:
    """Raise UserError for layers of another shape, and for atoms that are not in memory."""
    decoder = find_decoder(model)
    verify_structure(decoder)
    if decoder.lm_head.weight.is_meta or next(decoder.embed.parameters()).is_meta:
        raise UserError(
            f"device_map={job.device_map}: a model's LM head or embedding is offloaded; expected "
            "room for both on the devices"
        )


def _transport(job: AnalysisJob, models: Sequence[nn.Module], overlap: Overlap) -> Transport:
    """The map of a transfer between these models, on the student's device."""
    teacher, student = (find_decoder(model).lm_head.weight for model in models)
    heads = student[overlap.student_ids], teacher[overlap.teacher_ids].to(student.device)
    how = job.alignment.model_dump(include={"map", "top_k"})
    return Transport.build(*heads, **how)


@torch.inference_mode()
def decomposition(
    model: nn.Module, tokens: Sequence[Tokens], *, batch_size: int, seed: int
) -> dict[str, Any]:
    """Figure 2: cosine of each layer's output with what is left of it after decomposition.

    States are the block outputs, and what the LM head reads (`norm`). Each token's state is taken
    apart along the atoms and put together again; of the cosines come mean, standard deviation and
    5th and 95th percentile over all tokens, for the atoms and maps of `decomposition_maps`.
    `isotropic` is the mean to expect of states in all directions alike, `random_theory` that of
    random atoms. Cost: a forward pass of all tokens, 12 D^2 operations a token and layer, and
    the pseudoinverse of the LM head. Raises UserError for a state that is not finite.
    """
    decoder = find_decoder(model)
    last = len(decoder.layers) - 1
    states = [*((layer, "block") for layer in range(last + 1)), (last, "final")]
    weight = decoder.lm_head.weight
    maps = decomposition_maps(weight, decoder.embed.weight.to(weight.device), seed=seed)
    found: dict[tuple[str, str], list[list[Tensor]]] = {
        curve: [[] for _ in states] for curve in maps
    }
    for seen in _passes(model, tokens, states, batch_size):
        for state, hidden in enumerate(seen):
            hidden = hidden.to(weight.device).float()
            for (bases, how), matrix in maps.items():
                again = align(hidden, matrix, normalise=how == "cosine")
                cosines = F.cosine_similarity(hidden, again, dim=-1)
                found[bases, how][state].append(cosines.cpu())
    curves = [
        {
            "bases": bases,
            "map": how,
            "isotropic": isotropic_cosine(maps[bases, how]),
            **_spread([torch.cat(parts) for parts in found[bases, how]]),
        }
        for bases, how in maps
    ]
    atoms, width = weight.shape
    return {
        "states": [str(paper_number(layer)) for layer in range(last + 1)] + ["norm"],
        "width": width,
        "atoms": atoms,
        "positions": sum(len(example.ids) for example in tokens),
        "random_theory": tight_frame_cosine(width, atoms),
        "curves": curves,
    }


def decomposition_maps(
    head: Tensor, embedding: Tensor, *, seed: int
) -> dict[tuple[str, str], Tensor]:
    """Decomposition and recomposition in one space as matrices (D, D), by atoms and map.

    Atoms: `output`, columns of the LM head's pseudoinverse; `input`, rows of the embedding;
    `random`, as many Gaussian directions. Maps: `cosine`, the sum of the projections on the unit
    atoms (section 3.2, Eq. 1-2); `dual`, the expansion in the atoms and their dual frame, which
    loses nothing where the atoms span the space. Head and embedding: (m, D).
    """
    random = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed))
    rows = {"input": embedding.float(), "random": random.to(head.device)}
    units = {name: F.normalize(atoms, dim=1).T for name, atoms in rows.items()}
    units = {"output": semantic_bases(head).float(), **units}
    # the dual frame of W^+'s columns is W's rows, and a frame and its dual can change places
    frames = {"output": head.float(), **rows}
    cosine = {(name, "cosine"): cosine_map(atoms, atoms) for name, atoms in units.items()}
    return cosine | {(name, "dual"): dual_map(rows, rows) for name, rows in frames.items()}


def tight_frame_cosine(width: int, atoms: int) -> float:
    """sqrt(1 / (1 + D/m)): cosine of h with the sum of its projections on m random unit atoms.

    For unit h and A = sum of s_i s_i^T, E h^T A h = m/D and E |A h|^2 = m/D + m(m-1)/D^2, near
    m/D (1 + m/D); the first over the root of the second. Near 1 where atoms outnumber dimensions,
    sqrt(m/D) where they are few.
    """
    return float((1 + width / atoms) ** -0.5)


def isotropic_cosine(matrix: Tensor) -> float:
    """tr A / (sqrt D |A|_F): the same for any map A (D, D), over all directions h. 1 for the
    identity, the less the more unevenly the atoms lie.
    """
    return float(matrix.trace() / (len(matrix) ** 0.5 * matrix.norm()))


def _spread(cosines: Sequence[Tensor]) -> dict[str, list[float]]:
    """Statistics of each state's cosines (N,)."""
    if not all(values.isfinite().all() for values in cosines):
        raise UserError("layer outputs are not finite: try dtype float32 or bfloat16")
    ordered = [values.sort().values for values in cosines]
    ends = [(v[int(0.05 * len(v))].item(), v[int(0.95 * len(v))].item()) for v in ordered]
    return {
        "mean": [values.mean().item() for values in cosines],
        "std": [values.std(correction=0).item() for values in cosines],
        "low": [low for low, _ in ends],
        "high": [high for _, high in ends],
    }


@torch.inference_mode()
def similarity(
    teacher: nn.Module,
    student: nn.Module,
    tokens: tuple[Sequence[Tokens], Sequence[Tokens]],
    transport: Transport,
    *,
    positions: int,
    batch_size: int,
    seed: int,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Figure 4: CKA of every teacher layer with every student layer, by `exact` and `minibatch`.

    Panels: `before`, the block outputs as they are; `after`, the teacher's brought to the student's
    space by `transport`, as the student's targets are; with an adapter `trained`, the teacher's as
    they are and those of the student that wears it (`student` itself is changed). All from the same
    `positions` of all tokens, drawn once. A row a teacher layer, a column a student layer.

    **Arguments**: `tokens` are the same examples in the teacher's and the student's ids.

    Cost: a forward pass of the models, then at most 6 N^2 (D_T + D_S) operations in float64 a pair
    of layers and panel; memory: 4 N (L_T D_T + L_S D_S) bytes on the student's device.
    """
    device = find_decoder(student).lm_head.weight.device
    kept = drawn_positions(sum(len(e.ids) for e in tokens[0]), positions, seed=seed)

    def rows(model: nn.Module, examples: Sequence[Tokens]) -> Rows:
        return [x.to(device) for x in layer_rows(model, examples, kept, batch_size=batch_size)]

    said, heard = rows(teacher, tokens[0]), rows(student, tokens[1])
    panels = {"before": (said, heard), "after": ([transport(x) for x in said], heard)}
    if adapter is not None:
        panels["trained"] = (said, rows(load_adapter(student, adapter), tokens[1]))
    return {
        "map": "cosine" if transport.normalise else "dual",
        "positions": int(kept.sum()),
        "panels": [{"name": name, **compare(*both, seed=seed)} for name, both in panels.items()],
    }


def compare(xs: Rows, ys: Rows, *, seed: int) -> dict[str, Any]:
    """CKA of each x with each y, exact and from shuffled batches, and how far apart they are."""
    exact = [[min(linear_cka(x, y).item(), 1.0) for y in ys] for x in xs]
    count = len(xs[0])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    estimate = MinibatchCKA(len(xs), len(ys))
    for batch in order.chunk(-(-count // _BATCH_ROWS)):
        batch = batch.to(xs[0].device)
        estimate.update([x[batch] for x in xs], [y[batch] for y in ys])
    minibatch = estimate.matrix()
    furthest = (torch.tensor(exact, dtype=torch.float64) - minibatch).abs().max().item()
    return {"exact": exact, "minibatch": minibatch.tolist(), "max_difference": furthest}


def drawn_positions(total: int, count: int, *, seed: int) -> Tensor:
    """(total,) bool, True at `count` places drawn at random; everywhere if there are no more."""
    kept = torch.zeros(total, dtype=torch.bool)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    kept[order[:count]] = True
    return kept


def layer_rows(
    model: nn.Module, tokens: Sequence[Tokens], kept: Tensor, *, batch_size: int
) -> Rows:
    """Each block's output at the positions `kept` (N,) of all examples, in order: (N', D), float32.

    Raises UserError for an output that is not finite.
    """
    states = [(layer, "block") for layer in range(len(find_decoder(model).layers))]
    parts: list[Rows] = [[] for _ in states]
    start = 0
    for seen in _passes(model, tokens, states, batch_size):
        stop = start + len(seen[0])
        for layer, hidden in enumerate(seen):
            parts[layer].append(hidden[kept[start:stop].to(hidden.device)].float())
        start = stop
    rows = [torch.cat(blocks) for blocks in parts]
    if not all(block.isfinite().all() for block in rows):
        raise UserError("layer outputs are not finite: try dtype float32 or bfloat16")
    return rows


def _passes(
    model: nn.Module,
    tokens: Sequence[Tokens],
    states: Sequence[tuple[int, str]],
    batch_size: int,
) -> Iterator[Rows]:
    """What each state is at all positions (N, D) of one batch of examples after the other."""
    decoder = find_decoder(model)
    for start in range(0, len(tokens), batch_size):
        ids, mask = pad(tokens[start : start + batch_size], pad_id=0)
        with capture(decoder, states) as seen:
            run_base(decoder, ids, mask)
        where = mask.bool()
        yield [seen[state][where.to(seen[state].device)] for state in states]


def attribution(model: nn.Module, tokens: Sequence[Tokens], *, batch_size: int) -> dict[str, Any]:
    """Scores of all layers (section 4.1) for each granularity and aggregation.

    `scores` are gradient x activation in nats, added up over tokens, channels and examples;
    `share` is the same over the sum of its magnitudes, so that curves can be compared. `critical`
    is the layer of the largest magnitude, counted from 1. Cost: a forward and a backward pass of
    all examples a curve. Raises UserError for a score that is not finite.
    """
    curves = []
    for granularity in INTERFACES:
        for aggregation in AGGREGATIONS:
            how = {"granularity": granularity, "aggregation": aggregation}
            scores = attribute(model, tokens, batch_size=batch_size, **how)
            critical = paper_number(critical_layers(scores, 1)[0])
            curves.append({**how, "scores": scores, "share": shares(scores), "critical": critical})
    return {"curves": curves}


def shares(scores: Sequence[float]) -> list[float]:
    """Each score over the sum of all magnitudes; zeros stay zeros."""
    total = sum(map(abs, scores))
    return [score / total if total else 0.0 for score in scores]
