"""A figure of the analysis as an artifact: its numbers and its drawing.

<workdir>/analyses/<figure>-<key>/figure.png
                                  data.json       all numbers; layers counted as the caption has it
                                  manifest.json   written last: with it the figure is whole
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from semalign.analysis.figure import FIGURES, AnalysisFigure, FigureInputs
from semalign.artifacts.artifact import Artifact, Cost, Json
from semalign.artifacts.host import Host
from semalign.config.jobs import AnalysisJob
from semalign.data.tokens import fingerprint
from semalign.errors import UserError
from semalign.files import read_json, sha256, write_json
from semalign.models.decoder import find_decoder
from semalign.models.peft_folder import adapter_fingerprint
from semalign.models.reference import Model

IMAGE, DATA = "figure.png", "data.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnFigure(Artifact):
    """The figure that a job names."""

    kind = "figure"
    folder = "analyses"
    stage = "analyze"

    job: AnalysisJob
    inputs: FigureInputs

    @property
    def figure(self) -> AnalysisFigure:
        return FIGURES.find(self.job.figure, "figure")

    @property
    def label(self) -> str:
        return self.job.figure

    @property
    def models(self) -> tuple[Model, ...]:
        return self.inputs.models

    def identity(self) -> Json:
        job = self.job
        used = job.model_dump(
            mode="json",
            include=set(self.figure.settings) - {"adapter"},
            exclude={"alignment": {"min_overlap"}},
        )
        return {
            "figure": job.figure,
            "models": [model.identity for model in self.models],
            "rows": fingerprint(self.inputs.tokens),
            "shared": self.inputs.overlap and self.inputs.overlap.key,
            "adapter": job.adapter and adapter_fingerprint(job.adapter),
            **used,
        }

    def cost(self) -> Cost:
        """A forward pass of each model."""
        tokens = sum(len(example.ids) for example in self.inputs.tokens)
        weights = sum(model.shape.weights for model in self.models)
        return Cost(operations=2.0 * weights * tokens, memory=sum(m.bytes for m in self.models))

    def make(self, folder: Path, host: Host) -> Mapping[str, Json]:
        # the adapter is put onto the student itself: not a model that anything else goes on with
        models = host.models(*self.models)
        data = self.measured(models)
        host.forget()
        write_json(folder / DATA, data)
        self.figure.draw(data).savefig(folder / IMAGE, dpi=150)
        settings = self.job.model_dump(mode="json", exclude={"cluster", "tracking", "workdir"})
        files = {name: sha256(folder / name) for name in (IMAGE, DATA)}
        return {"sha256": files, "settings": settings}

    def measured(self, models: Sequence[nn.Module]) -> dict[str, Any]:
        """The numbers, as JSON values.

        Raises UserError for a model whose LM head or embedding is not in memory.
        """
        job, figure = self.job, self.figure
        for model in models:
            _check_in_memory(model, job)
        about = {name: getattr(job, name) for name in (*figure.models, "task", "split")}
        data = figure.measure(job, self.inputs, models)
        return {"figure": job.figure, **about, "examples": len(self.inputs.tokens), **data}

    @staticmethod
    def read(folder: Path) -> dict[str, Any]:
        return dict(read_json(folder / DATA))


def _check_in_memory(model: nn.Module, job: AnalysisJob) -> None:
    decoder = find_decoder(model)
    if decoder.lm_head.weight.is_meta or next(decoder.embed.parameters()).is_meta:
        raise UserError(
            f"device_map={job.device_map}: a model's LM head or embedding is offloaded; expected "
            "room for both on the devices"
        )
