"""Figure 2: layer outputs decomposed along atoms and recomposed, by layer, atoms and map.

D width, m atoms, N tokens (positions of all examples). Lists by layer begin with the shallowest
layer, which people are shown as layer 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from semalign.analysis.figure import (
    BLUE,
    GREEN,
    ORANGE,
    AnalysisFigure,
    FigureData,
    FigureInputs,
    FigureTable,
    examples_caption,
    model_caption,
)
from semalign.analysis.states import hidden_states
from semalign.config.jobs import AnalysisJob
from semalign.core.alignment import align, cosine_map, dual_map
from semalign.core.bases import semantic_bases
from semalign.core.pairing import paper_number
from semalign.data.tokens import Tokens
from semalign.errors import UserError
from semalign.models.decoder import find_decoder

# bases -> (label, colour, marker, size): sizes nest where all curves lie on each other
_BASES = {
    "output": ("output-side: LM head's pseudoinverse", BLUE, "o", 9.0),
    "input": ("input-side: embedding rows", ORANGE, "s", 6.0),
    "random": ("random directions", GREEN, "^", 4.0),
}
_MAPS = {
    "cosine": "cosine map: projections on unit atoms, added up",
    "dual": "dual map: atoms and their dual frame",
}


class DecompositionFigure(AnalysisFigure):
    """Mean cosine by layer with the band from 5th to 95th percentile; a panel a map."""

    name = "decomposition"
    models = ("model",)
    settings = ("seed",)

    def measure(
        self, job: AnalysisJob, inputs: FigureInputs, models: Sequence[nn.Module]
    ) -> dict[str, Any]:
        [model] = models
        return recomposition_cosines(model, inputs.tokens, batch_size=job.batch_size, seed=job.seed)

    def draw(self, data: FigureData) -> Figure:
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, how in zip(panels, ("cosine", "dual"), strict=True):
            _draw_panel(axes, data, how)
        panels[0].axhline(
            data["random_theory"],
            color=GREEN,
            linestyle="--",
            linewidth=1.2,
            label="random: theory",
        )
        lowest = min(low for curve in data["curves"] for low in curve["low"])
        panels[0].set_ylim(min(0.0, lowest - 0.02), 1.04)
        panels[0].set_ylabel("cosine with the layer output")
        figure.suptitle(
            f"Decomposed and recomposed layer outputs of {model_caption(data['model'])} "
            f"(D={data['width']}, {data['atoms']} atoms; {examples_caption(data)})",
            fontsize=11,
        )
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9
        )
        return figure

    def table(self, data: FigureData) -> FigureTable:
        """A row a state: the cosine map's mean and standard deviation by atoms, and the least of
        the dual map's means.
        """
        cosine, dual = (
            [c for c in data["curves"] if c["map"] == how] for how in ("cosine", "dual")
        )
        rows = [
            [
                state,
                *(f" {curve['mean'][place]:.3f} ±{curve['std'][place]:.3f}" for curve in cosine),
                f" {min(curve['mean'][place] for curve in dual):.3f}",
            ]
            for place, state in enumerate(data["states"])
        ]
        least = min(curve["isotropic"] for curve in dual)
        isotropic = [f"{curve['isotropic']:.3f}" for curve in cosine]
        rows.append(["isotropic", *isotropic, f"{least:.3f}"])
        title = (
            f"{data['model']}: cosine of layer outputs and their recomposition "
            f"(random in theory {data['random_theory']:.3f})"
        )
        return title, ["layer", *(curve["bases"] for curve in cosine), " dual (least)"], rows


@torch.inference_mode()
def recomposition_cosines(
    model: nn.Module, tokens: Sequence[Tokens], *, batch_size: int, seed: int
) -> dict[str, Any]:
    """The cosine of each layer's output with its recomposition, by atoms and map.

    States are the block outputs, and the hidden state that the LM head reads (`norm`). Each
    token's state is decomposed along the atoms and recomposed; of the cosines come mean, standard
    deviation and 5th and 95th percentile over all tokens, for the atoms and maps of
    `decomposition_maps`. `isotropic` is the mean to expect of states in all directions alike,
    `random_theory` that of random atoms. Cost: a forward pass of all tokens, 12 D^2 operations a
    token and layer, and the pseudoinverse of the LM head. Raises UserError for a state that is not
    finite.
    """
    decoder = find_decoder(model)
    last = len(decoder.layers) - 1
    states = [*((layer, "block") for layer in range(last + 1)), (last, "final")]
    weight = decoder.lm_head.weight
    maps = decomposition_maps(weight, decoder.embed.weight.to(weight.device), seed=seed)
    found: dict[tuple[str, str], list[list[Tensor]]] = {
        curve: [[] for _ in states] for curve in maps
    }
    for batch in hidden_states(model, tokens, states, batch_size=batch_size):
        for state, hidden in enumerate(batch):
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
    """tr A / (sqrt D |A|_F): the cosine of h with A h over all directions h, for a map A (D, D).

    It is 1 for the identity, and the smaller the more unevenly the atoms lie.
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


def _draw_panel(axes: Axes, data: FigureData, how: str) -> None:
    """All curves of one map, with states on the x axis."""
    layers = len(data["states"]) - 1
    for curve in data["curves"]:
        if curve["map"] == how:
            _draw_curve(axes, curve, layers)
    axes.set_title(_MAPS[how], fontsize=10)
    ticks = [*range(0, layers, _step(layers)), layers]
    axes.set_xticks(ticks, [data["states"][place] for place in ticks])
    axes.set_xlabel("layer output (counted from 1); norm: what the LM head reads")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _draw_curve(axes: Axes, curve: FigureData, layers: int) -> None:
    label, colour, marker, size = _BASES[curve["bases"]]
    places = range(layers + 1)
    look: FigureData = {"color": colour, "marker": marker, "markersize": size, "fillstyle": "none"}
    axes.plot(places[:-1], curve["mean"][:-1], label=label, markevery=_step(layers), **look)
    axes.plot(places[-1:], curve["mean"][-1:], linestyle="none", **look)
    low, high = curve["low"], curve["high"]
    axes.fill_between(places[:-1], low[:-1], high[:-1], color=colour, alpha=0.18, linewidth=0)
    axes.vlines(layers, low[-1], high[-1], color=colour, alpha=0.4, linewidth=3)


def _step(layers: int) -> int:
    """The distance between marked layers, so that about ten are marked."""
    return max(1, -(-layers // 10))
