"""Checked settings and tokens for a figure of the analysis; no weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from semalign.analysis.figure import FIGURES, AnalysisFigure, FigureInputs
from semalign.config.jobs import AnalysisJob
from semalign.data.root import data_root
from semalign.data.tokens import tokenise, translate_tokens
from semalign.errors import UserError
from semalign.models.heads import find_lm_head
from semalign.models.loading import load_tokenizer
from semalign.models.peft_folder import check_adapter
from semalign.models.reference import Model
from semalign.models.support import check_supported
from semalign.models.vocabulary import Overlap, vocabulary_overlap
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
    tokenizers = [load_tokenizer(path, trust_remote_code=trust) for path in paths]
    examples = load_split(data_root(job.root), job.task, job.split)[: job.limit]
    tokens = teacher_tokens = tokenise(examples, tokenizers[-1], max_length=job.max_length)
    overlap = None
    if len(paths) == 2:
        overlap = _overlap(job, models, tokenizers)
        teacher_tokens = translate_tokens(tokens, overlap.student_to_teacher)
    if job.adapter is not None:
        check_adapter(job.adapter, job.student, trust_remote_code=trust)
    return FigureInputs(
        models=models, tokens=tokens, teacher_tokens=teacher_tokens, overlap=overlap
    )


def _overlap(job: AnalysisJob, models: Sequence[Model], tokenizers: Sequence[Any]) -> Overlap:
    """The tokens both vocabularies share; UserError when they are too few."""
    teacher, student = models
    overlap = vocabulary_overlap(
        tokenizers[1],
        tokenizers[0],
        student_rows=student.config.vocab_size,
        teacher_rows=teacher.config.vocab_size,
    )
    if overlap.fraction < job.alignment.min_overlap or not len(overlap.student_ids):
        raise UserError(
            f"alignment.min_overlap={job.alignment.min_overlap}: only {overlap.fraction:.1%} of "
            f"the tokens of {job.student} are in the vocabulary of {job.teacher}; expected models "
            "of one family"
        )
    return overlap


def _refuse_unused(job: AnalysisJob, figure: AnalysisFigure) -> None:
    """Raise UserError for a given setting that only other figures use."""
    used = {*figure.models, *figure.settings}
    others = {name for other in FIGURES.values() for name in (*other.models, *other.settings)}
    if given := sorted(job.model_fields_set & (others - used)):
        raise UserError(
            f"{given[0]}: figure={job.figure} does not use it; expected some of: "
            f"{', '.join(sorted(used))}"
        )
