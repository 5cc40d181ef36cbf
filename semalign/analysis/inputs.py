"""Checked settings and tokens for a figure of the analysis; no weight is loaded."""

from __future__ import annotations

from typing import Any

from semalign.analysis.figure import FIGURES, AnalysisFigure, FigureInputs
from semalign.artifacts.files import content_key
from semalign.config.jobs import AnalysisJob
from semalign.data.root import data_root
from semalign.data.tokens import fingerprint, tokenise, translate
from semalign.errors import UserError
from semalign.models.fingerprints import model_fingerprint, tokenizer_fingerprint
from semalign.models.heads import find_lm_head
from semalign.models.loading import load_config, load_tokenizer
from semalign.models.peft_folder import adapter_fingerprint, check_adapter
from semalign.models.vocabulary import Overlap, vocabulary_overlap
from semalign.tasks import load_split


def load_figure_inputs(job: AnalysisJob) -> FigureInputs:
    """The inputs of the job's figure, after every check that needs no weights.

    The key depends on everything that determines the figure: weights, tokens, its settings, the
    dtype. Raises UserError for a setting that the figure does not use, missing models, data or
    adapters, and models whose vocabularies are too different (`alignment.min_overlap`).
    """
    figure = FIGURES.find(job.figure, "figure")
    _refuse_unused(job, figure)
    trust = job.trust_remote_code
    paths = [getattr(job, name) for name in figure.models]
    for path in paths:
        find_lm_head(path, trust_remote_code=trust)
    tokenizers = [load_tokenizer(path, trust_remote_code=trust) for path in paths]
    examples = load_split(data_root(job.root), job.task, job.split)[: job.limit]
    tokens = teacher_tokens = tokenise(examples, tokenizers[-1], max_length=job.max_length)
    overlap = None
    if len(paths) == 2:
        overlap = _overlap(job, *tokenizers)
        teacher_tokens = translate(tokens, overlap.student_to_teacher)
    fingerprints = [[model_fingerprint(path), tokenizer_fingerprint(path)] for path in paths]
    if job.adapter is not None:
        check_adapter(job.adapter, job.student, trust_remote_code=trust)
        fingerprints.append([adapter_fingerprint(job.adapter)])
    used = job.model_dump(
        mode="json",
        include=set(figure.settings) - {"adapter"},
        exclude={"alignment": {"min_overlap"}},
    )
    return FigureInputs(
        key=content_key(job.figure, fingerprints, fingerprint(tokens), used, job.dtype),
        tokens=tokens,
        teacher_tokens=teacher_tokens,
        overlap=overlap,
    )


def _overlap(job: AnalysisJob, teacher: Any, student: Any) -> Overlap:
    """The tokens both vocabularies share; UserError when they are too few."""
    trust = job.trust_remote_code
    overlap = vocabulary_overlap(
        student,
        teacher,
        student_rows=load_config(job.student, trust_remote_code=trust).get_text_config().vocab_size,
        teacher_rows=load_config(job.teacher, trust_remote_code=trust).get_text_config().vocab_size,
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
