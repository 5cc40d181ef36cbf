"""The numbers of any figure, from a job: its models are loaded and checked, then measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from semalign.analysis.figure import FIGURES, FigureInputs
from semalign.config.jobs import AnalysisJob
from semalign.errors import UserError
from semalign.models.decoder import find_decoder, verify_structure


def measure(
    job: AnalysisJob, inputs: FigureInputs, load: Callable[[str], nn.Module]
) -> dict[str, Any]:
    """The data of the job's figure, as JSON values; `load` makes a model of a path.

    Cost: that of the figure's own `measure`. Raises UserError for a model of another structure, and
    for one whose LM head or embedding is not in memory.
    """
    figure = FIGURES.find(job.figure, "figure")
    models = [load(getattr(job, name)) for name in figure.models]
    for model in models:
        _check_model(model, job)
    about = {name: getattr(job, name) for name in (*figure.models, "task", "split")}
    data = figure.measure(job, inputs, models)
    return {"figure": job.figure, **about, "examples": len(inputs.tokens), **data}


def _check_model(model: nn.Module, job: AnalysisJob) -> None:
    decoder = find_decoder(model)
    verify_structure(decoder)
    if decoder.lm_head.weight.is_meta or next(decoder.embed.parameters()).is_meta:
        raise UserError(
            f"device_map={job.device_map}: a model's LM head or embedding is offloaded; expected "
            "room for both on the devices"
        )
