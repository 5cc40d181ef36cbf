"""Figure 4: CKA of every teacher layer with every student layer, before and after alignment.

D width, N tokens (the chosen positions of all examples), L layers. A matrix has a row a teacher
layer and a column a student layer, and begins with the shallowest ones, shown as layer 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from semalign.analysis.figure import (
    AnalysisFigure,
    FigureData,
    FigureInputs,
    FigureTable,
    examples_caption,
    model_caption,
)
from semalign.analysis.states import hidden_states
from semalign.config.jobs import AnalysisJob
from semalign.core.bases import semantic_bases
from semalign.core.pairing import paper_number
from semalign.core.similarity import MinibatchCKA, linear_cka
from semalign.data.tokens import Tokens, count_positions
from semalign.errors import UserError
from semalign.models.decoder import find_decoder
from semalign.models.vocabulary import Overlap
from semalign.stages.mapping import MAPS, Transport

_BATCH_ROWS = 512  # of minibatch CKA
_CELLS = 16  # matrices of at most so many layers a side have their numbers written in
_PANELS = {
    "before": "before: teacher's outputs as they are",
    "after": "after: teacher's outputs in the student's space",
    "trained": "trained: student with the adapter",
}

_Matrix = Sequence[Sequence[float]]


class SimilarityFigure(AnalysisFigure):
    """Exact CKA of teacher and student layers: a heat map a panel, all on one scale."""

    name = "similarity"
    models = ("teacher", "student")
    settings = ("adapter", "alignment", "positions", "seed")

    def measure(
        self, job: AnalysisJob, inputs: FigureInputs, models: Sequence[nn.Module]
    ) -> dict[str, Any]:
        assert inputs.overlap is not None
        teacher, student = models
        return similarity_panels(
            teacher,
            student,
            (inputs.teacher_tokens, inputs.tokens),
            _transport(job, models, inputs.overlap),
            positions=job.positions,
            batch_size=job.batch_size,
            seed=job.seed,
            adapter=job.adapter,
        )

    def draw(self, data: FigureData) -> Figure:
        panels = data["panels"]
        rows, columns = len(panels[0]["exact"]), len(panels[0]["exact"][0])
        wide, high = min(max(0.62 * columns, 3.4), 7.0), min(max(0.52 * rows, 2.8), 7.0)
        figure = Figure(figsize=(len(panels) * wide + 1.4, high + 1.4), layout="constrained")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=True):
            image = axes.imshow(
                panel["exact"], cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower"
            )
            if max(rows, columns) <= _CELLS:
                _write_cells(axes, panel["exact"])
            axes.set_title(_PANELS[panel["name"]], fontsize=9)
            axes.set_xlabel("student layer (from 1)")
            axes.set_xticks(*_layer_ticks(columns))
        grid[0].set_ylabel("teacher layer (from 1)")
        grid[0].set_yticks(*_layer_ticks(rows))
        figure.colorbar(image, ax=list(grid), label="linear CKA")
        furthest = max(panel["max_difference"] for panel in panels)
        figure.suptitle(
            f"{model_caption(data['teacher'])} and {model_caption(data['student'])} "
            f"({examples_caption(data)}; {data['map']} map; minibatch CKA within {furthest:.3f})",
            fontsize=9,
        )
        return figure

    def table(self, data: FigureData) -> FigureTable:
        """A row a student layer: the teacher layer most like it, in each panel."""
        panels = data["panels"]
        rows = []
        for column in range(len(panels[0]["exact"][0])):
            best = [_best([row[column] for row in panel["exact"]]) for panel in panels]
            rows.append([str(paper_number(column)), *best])
        rows.append(["mean of all", *(f"{_mean(panel['exact']):.3f}" for panel in panels)])
        rows.append(["minibatch", *(f"{_mean(panel['minibatch']):.3f}" for panel in panels)])
        rows.append(["furthest", *(f"{panel['max_difference']:.3f}" for panel in panels)])
        title = f"most similar layer of {data['teacher']} (its CKA) for each of {data['student']}"
        return title, ["student layer", *(panel["name"] for panel in panels)], rows


def _transport(job: AnalysisJob, models: Sequence[nn.Module], overlap: Overlap) -> Transport:
    """The map of a transfer between these models, on the student's device."""
    teacher, student = (find_decoder(model).lm_head.weight for model in models)
    kind = MAPS.find(job.alignment.map, "alignment.map")
    if kind.uses_bases:
        of_student = semantic_bases(student)[:, overlap.student_ids]
        of_teacher = semantic_bases(teacher)[:, overlap.teacher_ids]
    else:
        of_student, of_teacher = student[overlap.student_ids], teacher[overlap.teacher_ids]
    return Transport.build(
        of_student, of_teacher.to(student.device), kind, top_k=job.alignment.top_k
    )


@torch.inference_mode()
def similarity_panels(
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
    """CKA of every teacher layer with every student layer, `exact` and from minibatches.

    Panels: `before`, the block outputs as they are; `after`, the teacher's brought to the student's
    space by `transport`, as the student's targets are; with an adapter `trained`, the teacher's as
    they are and those of the student with the adapter (`student` itself is changed). All from the
    same `positions` of all tokens, drawn once. A row a teacher layer, a column a student layer.

    **Arguments**: `tokens` are the same examples in the teacher's and the student's ids.

    Cost: a forward pass of the models, then at most 6 N^2 (D_T + D_S) operations in float64 a pair
    of layers and panel; memory: 4 N (L_T D_T + L_S D_S) bytes on the student's device.
    """
    device = find_decoder(student).lm_head.weight.device
    total = sum(count_positions(e.align_positions("all")) for e in tokens[0])
    kept = drawn_positions(total, positions, seed=seed)

    def outputs(model: nn.Module, examples: Sequence[Tokens]) -> list[Tensor]:
        return [x.to(device) for x in layer_outputs(model, examples, kept, batch_size=batch_size)]

    xs, ys = outputs(teacher, tokens[0]), outputs(student, tokens[1])
    panels = {"before": (xs, ys), "after": ([transport(x) for x in xs], ys)}
    if adapter is not None:
        from semalign.models.adapters import load_adapter

        panels["trained"] = (xs, outputs(load_adapter(student, adapter), tokens[1]))
    return {
        "map": "cosine" if transport.normalise else "dual",
        "positions": int(kept.sum()),
        "panels": [
            {"name": name, **compare_layers(*both, seed=seed)} for name, both in panels.items()
        ],
    }


def compare_layers(xs: Sequence[Tensor], ys: Sequence[Tensor], *, seed: int) -> dict[str, Any]:
    """CKA of each x (N, D) with each y, exact and from shuffled batches, and how far apart."""
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


def layer_outputs(
    model: nn.Module, tokens: Sequence[Tokens], kept: Tensor, *, batch_size: int
) -> list[Tensor]:
    """Each block's output at the positions `kept` (N,) of all examples, in order: (N', D), float32.

    Raises UserError for an output that is not finite.
    """
    states = [(layer, "block") for layer in range(len(find_decoder(model).layers))]
    parts: list[list[Tensor]] = [[] for _ in states]
    start = 0
    for batch in hidden_states(model, tokens, states, batch_size=batch_size):
        stop = start + len(batch[0])
        for layer, hidden in enumerate(batch):
            parts[layer].append(hidden[kept[start:stop].to(hidden.device)].float())
        start = stop
    outputs = [torch.cat(blocks) for blocks in parts]
    if not all(block.isfinite().all() for block in outputs):
        raise UserError("layer outputs are not finite: try dtype float32 or bfloat16")
    return outputs


def _write_cells(axes: Axes, matrix: _Matrix) -> None:
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            colour = "white" if value < 0.5 else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8
            )


def _layer_ticks(count: int) -> tuple[list[int], list[str]]:
    """Every layer, or some where there are many; always the first."""
    places = list(range(0, count, max(1, -(-count // _CELLS))))
    return places, [str(paper_number(place)) for place in places]


def _best(column: Sequence[float]) -> str:
    top = max(range(len(column)), key=column.__getitem__)
    return f"{paper_number(top)} ({column[top]:.3f})"


def _mean(matrix: _Matrix) -> float:
    return sum(map(sum, matrix)) / sum(map(len, matrix))
