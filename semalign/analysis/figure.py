"""What a figure of the analysis is: the settings it uses, its numbers, its drawing, its table.

Layers on axes and in tables count from 1, as in the paper. Colours are Okabe and Ito's, which
colour-blind readers can distinguish, and every curve has its own marker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure
from torch import nn

from semalign.config.jobs import AnalysisJob
from semalign.data.tokens import Tokens
from semalign.models.reference import Model
from semalign.models.vocabulary import Overlap
from semalign.registry import Registry

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#777777"
FigureData = Mapping[str, Any]
FigureTable = tuple[str, list[str], list[list[str]]]  # title, column titles, rows


@dataclass(frozen=True, kw_only=True)
class FigureInputs:
    """The figure's models, and the examples as ids of its model, or of student and teacher.

    `overlap` is None for a figure of one model, whose `teacher_tokens` are its `tokens`.
    """

    models: tuple[Model, ...]
    tokens: list[Tokens]
    teacher_tokens: list[Tokens]
    overlap: Overlap | None


class AnalysisFigure(ABC):
    """A figure of the paper's analysis: what it measures, and how that is drawn and tabulated.

    `models` are the settings that name its models: one model, or the teacher and the student,
    whose vocabularies are then matched. `settings` are the other settings it uses, beyond those
    that every figure uses (examples, dtype, devices, batch size).
    """

    name: ClassVar[str]
    models: ClassVar[tuple[str, ...]]
    settings: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def measure(
        self, job: AnalysisJob, inputs: FigureInputs, models: Sequence[nn.Module]
    ) -> dict[str, Any]:
        """The numbers of the figure, as JSON values, from its loaded `models` in their order."""

    @abstractmethod
    def draw(self, data: FigureData) -> Figure:
        """The figure, from its numbers alone."""

    @abstractmethod
    def table(self, data: FigureData) -> FigureTable:
        """The table of at most 80 columns that is shown in a terminal, from the numbers alone."""


FIGURES: Registry[AnalysisFigure] = Registry("figure")


def register_figure(figure: AnalysisFigure) -> AnalysisFigure:
    """Add a figure under its name, or replace the one of that name; returns it."""
    return FIGURES.register(figure.name, figure)


def examples_caption(data: FigureData) -> str:
    """The task, the split and the number of examples that the numbers come from."""
    return f"{data['task']} {data['split']}, {data['examples']} examples"


def model_caption(model: str) -> str:
    """The last folder of an absolute path; `zoo/student` and hub ids as they are."""
    return Path(model).name if Path(model).is_absolute() else model
