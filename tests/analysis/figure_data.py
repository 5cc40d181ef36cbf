"""What the tests of the figures share: made-up data, and states computed one example at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from semalign.data.tokens import Tokens
from semalign.models.decoder import capture, find_decoder, run_base
from semalign.models.loading import load_model

SOURCE = {"task": "humaneval", "split": "extract", "examples": 32}


def states_of(path: Path, tokens: list[Tokens], interface: str, layer: int) -> torch.Tensor:
    """A layer's output at all positions, one example at a time."""
    decoder = find_decoder(load_model(path))
    rows = []
    for example in tokens:
        ids = torch.tensor([example.ids])
        with torch.no_grad(), capture(decoder, [(layer, interface)]) as seen:
            run_base(decoder, ids, torch.ones_like(ids))
        rows.append(seen[layer, interface][0])
    return torch.cat(rows)


def short(tokens: list[Tokens]) -> list[Tokens]:
    """Few examples of unequal length."""
    return [Tokens(e.id, e.ids[: 5 + 2 * i], 1) for i, e in enumerate(tokens[:3])]


def decomposition_data(layers: int = 3) -> dict[str, Any]:
    curves = [
        {
            "bases": bases,
            "map": how,
            "isotropic": 0.9,
            "mean": [level + 0.01 * state for state in range(layers + 1)],
            "std": [0.02] * (layers + 1),
            "low": [level - 0.1] * (layers + 1),
            "high": [level + 0.05] * (layers + 1),
        }
        for how, start in (("cosine", 0.5), ("dual", 0.8))
        for bases, level in (("output", start), ("input", start + 0.1), ("random", start + 0.15))
    ]
    states = [str(layer + 1) for layer in range(layers)] + ["norm"]
    return {
        "figure": "decomposition", "model": "/models/Llama", **SOURCE, "states": states,
        "width": 128, "atoms": 512, "random_theory": 0.894, "curves": curves,
    }  # fmt: skip


def similarity_data(rows: int = 3, columns: int = 2, names: tuple[str, ...] = ("before", "after")):  # type: ignore[no-untyped-def]
    exact = [
        [(row + column) / (rows + columns) for column in range(columns)] for row in range(rows)
    ]
    panels = [
        {"name": name, "exact": exact, "minibatch": exact, "max_difference": 0.01} for name in names
    ]
    return {
        "figure": "similarity", "teacher": "zoo/teacher", "student": "zoo/student", **SOURCE,
        "map": "cosine", "panels": panels,
    }  # fmt: skip


def attribution_data() -> dict[str, Any]:
    curves = [
        {"granularity": granularity, "aggregation": how, "critical": 2,
         "scores": [1.0, -3.0, 2.0], "share": [1 / 6, -0.5, 1 / 3]}
        for granularity in ("block", "attn", "mlp")
        for how in ("abs_sum", "sum")
    ]  # fmt: skip
    return {"figure": "attribution", "teacher": "zoo/teacher", **SOURCE, "curves": curves}


def ticks(axes: Axes, side: str = "x") -> list[str]:
    return [text.get_text() for text in getattr(axes, f"get_{side}ticklabels")()]


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
