"""Checked settings and tokens for a figure of the analysis; no weight is loaded."""

from __future__ import annotations

from semalign.analysis.figure import FIGURES, AnalysisFigure, FigureInputs
from semalign.config.jobs import AnalysisJob
from semalign.data.root import data_root
from semalign.data.spans import in_both
from semalign.data.tokens import tokenise
from semalign.errors import UserError
from semalign.methods.inputs import check_overlap, sides
from semalign.models.heads import find_lm_head
from semalign.models.loading import load_tokenizer
from semalign.models.peft_folder import check_adapter
from semalign.models.reference import Model
from semalign.models.support import check_supported
from semalign.plugins import load_plugins
from semalign.tasks import load_split


def load_figure_inputs(job: AnalysisJob) -> FigureInputs:
    """The inputs of the job's figure, after every check that needs no weights.

    Raises UserError for a setting that the figure does not use, missing models, data or
    adapters, and models whose vocabularies are too different (`alignment.min_overlap`).
    """
    load_plugins(job.plugins)
    figure = FIGURES.find(job.figure, "figure")
    _refuse_unused(job, figure)
    trust = job.trust_remote_code
    paths = [getattr(job, name) for name in figure.models]
    for path in paths:
        find_lm_head(path, trust_remote_code=trust)
    models = tuple(
        Model.open(path, dtype=job.dtype, trust_remote_code=trust, cache=job.work / "fingerprints")
        for path in paths
    )
    for model in models:
        check_supported(model)
    examples = load_split(data_root(job.root), job.task, job.split)[: job.limit]
    overlap = None
    if len(models) == 2:
        teacher, student = models
        *both, overlap = sides(student, teacher)
        check_overlap(overlap, job.alignment, job.student, job.teacher)
        found = in_both(
            examples,
            *both,
            max_length=job.max_length,
            unaligned=job.alignment.unaligned,
        )
        tokens, teacher_tokens = found.student, found.teacher
        for note in found.notes(f"{job.task}/{job.split}"):
            print(f"[data] {note}")
    else:
        tokenizer = load_tokenizer(paths[0], trust_remote_code=trust)
        tokens = teacher_tokens = tokenise(examples, tokenizer, max_length=job.max_length)
    if job.adapter is not None:
        check_adapter(job.adapter, job.student, trust_remote_code=trust)
    return FigureInputs(
        models=models, tokens=tokens, teacher_tokens=teacher_tokens, overlap=overlap
    )


def _refuse_unused(job: AnalysisJob, figure: AnalysisFigure) -> None:
    """Raise UserError for a given setting that only other figures use."""
    used = {*figure.models, *figure.settings}
    others = {name for other in FIGURES.values() for name in (*other.models, *other.settings)}
    if given := sorted(job.model_fields_set & (others - used)):
        raise UserError(
            f"{given[0]}: figure={job.figure} does not use it; expected some of: "
            f"{', '.join(sorted(used))}"
        )
