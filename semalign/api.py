"""The Python API: what the package `semalign` offers, one function a thing to do.

Everything works in a notebook and without Ray: `transfer` and `evaluate` run on Ray unless they are
called with `local=True`. Models are named as in a configuration: a folder, a hub id, or `zoo/...`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semalign.artifacts.artifact import Workspace
from semalign.artifacts.host import Host
from semalign.config.dotted import expand
from semalign.config.jobs import Config, EvaluationJob
from semalign.config.read import validate
from semalign.core.pairing import Pair, pair_layers
from semalign.models.reference import Model
from semalign.stages.update import HISTORY

if TYPE_CHECKING:
    import pandas as pd
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from semalign.core.statistics import Score
    from semalign.stages.mapping import Transport

_Values = Any  # of settings, by dotted names or as nested mappings


def semantic_bases(model: str, *, trust_remote_code: bool = False) -> Tensor:
    """The semantic bases of a model's LM head, (D, V) float32 with columns of unit length.

    Section 3.1. **Raises** `UserError` for a missing model, or one without an LM head.
    """
    from semalign.core import bases
    from semalign.models.heads import read_lm_head

    return bases.semantic_bases(read_lm_head(model, trust_remote_code=trust_remote_code))


def semantic_map(
    student: str, teacher: str, *, map: str = "cosine", top_k: int | None = None
) -> Transport:
    """The map from the teacher's space to the student's (Eq. 1-2), over the tokens both have.

    Called with (..., D_T) hidden states it returns (..., D_S). `.matrix` is (D_S, D_T), or None
    with `top_k`, which keeps so many of the strongest coefficients. **Raises** `UserError` for
    missing models and an unknown `map`.
    """
    import tempfile

    from semalign.config.sections import Alignment
    from semalign.stages.mapping import Map

    config = Config(teacher=teacher, student=student)
    inputs = _models(config)
    wanted = Map(
        student=inputs[0],
        teacher=inputs[1],
        shared=_shared(*inputs),
        alignment=Alignment(map=map, top_k=top_k),
    )
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        host = Host(workspace)
        for artifact in (*wanted.needs(), wanted):
            workspace.ensure(artifact, lambda place, a=artifact: a.make(place, host))  # type: ignore[misc]
        return wanted.read(workspace.place(wanted))


def attribute(
    model: str,
    *,
    task: str = "mmlu",
    split: str = "extract",
    root: str = "zoo/data",
    limit: int | None = None,
    granularity: str = "block",
    aggregation: str = "abs_sum",
    batch_size: int = 8,
    dtype: str = "float32",
) -> list[float]:
    """One attribution score a layer, the shallowest first: gradient x activation (section 4.1).

    The loss is the mean cross-entropy of the answers of the split's first `limit` examples.
    `granularity` is block, attn or mlp, `aggregation` abs_sum or sum. **Raises** `UserError` for
    missing models or data.
    """
    from semalign.data.root import data_root
    from semalign.data.tokens import tokenise
    from semalign.models.loading import load_model, load_tokenizer
    from semalign.stages import attribution
    from semalign.tasks import load_split

    Model.open(model, dtype=dtype, planned=True)  # refuses what its files do not describe
    examples = load_split(data_root(root), task, split)[:limit]
    tokens = tokenise(examples, load_tokenizer(model), max_length=1024)
    return attribution.attribution_scores(
        load_model(model, dtype=dtype),
        tokens,
        granularity=granularity,
        aggregation=aggregation,
        batch_size=batch_size,
    )


def pairs(
    strategy: str = "proportional",
    *,
    scores: Iterable[float],
    student_layers: int,
    top_n: int = 1,
    seed: int = 0,
) -> list[Pair]:
    """The layer pairs of a strategy from attribution scores; layers count from 0 (section 4.1).

    `scores` has one value a teacher layer (`attribute`). **Raises** `UserError` for an unknown
    strategy.
    """
    from semalign.core.attribution import critical_layers

    found = list(scores)
    return pair_layers(
        strategy,
        num_teacher_layers=len(found),
        num_student_layers=student_layers,
        critical=critical_layers(found, top_n),
        seed=seed,
    )


@dataclass(frozen=True)
class TransferResult:
    """What a transfer left: `folder` holds it, `run_id` is its MLflow run.

    `scores` has a Score (value, low, high, n; fractions) for every (candidate, task, split), where
    the candidates are student, teacher and transferred. `config` has the values in effect.
    """

    folder: Path
    run_id: str
    scores: Mapping[tuple[str, str, str], Score]
    config: Config

    @property
    def adapter(self) -> str | None:
        """The folder of the LoRA adapter in PEFT's layout; None where it is a whole student."""
        folder = self.folder / "adapter"
        return str(folder) if (folder / "adapter_config.json").exists() else None

    @property
    def student(self) -> str:
        """The model that is run: the whole transferred student, or the base of the adapter."""
        whole = self.folder / "student"
        return str(whole) if whole.exists() else self.config.student

    def model(self) -> PeftModel | PreTrainedModel:
        """The transferred student in memory: a PEFT model, or the merged one."""
        from semalign.models.adapters import load_adapter
        from semalign.models.loading import load_model

        base: Any = load_model(self.student, dtype=self.config.dtype)
        return base if self.adapter is None else load_adapter(base, self.adapter)  # type: ignore[return-value]

    @property
    def history(self) -> pd.DataFrame:
        """Losses and learning rate, a row a step."""
        import pandas as pd

        series = json.loads((self.folder / HISTORY).read_text(encoding="utf-8"))
        frame = pd.DataFrame(series)
        frame.index = pd.RangeIndex(1, len(frame) + 1, name="step")
        return frame

    @property
    def table(self) -> pd.DataFrame:
        """Scores as percentages: a row a candidate, a column a (split, task)."""
        return _table(self.scores)


def transfer(
    student: str = "zoo/student",
    teacher: str = "zoo/teacher",
    *,
    task: str = "mmlu",
    local: bool = False,
    **settings: _Values,
) -> TransferResult:
    """Transfer from the teacher to the student on one task, score it, and record it in MLflow.

    `settings` are those of a configuration: sections as mappings (`training={"epochs": 2}`), or
    dotted names in a mapping (`**{"loss.alpha": 0.3}`). With `local` everything runs in this
    process and an engine's, without Ray. What is finished is not done again.

    **Raises** `UserError` for bad input and settings without an effect, `Diverged` when the loss is
    no longer finite.
    """
    from semalign.engine import transfer as engine

    tree = expand({"data.task": task, **settings})
    config = validate({**tree, "student": student, "teacher": teacher})
    outcome = engine.run_transfer(config, local=local)
    return TransferResult(outcome.folder, outcome.run_id, outcome.scored.scores, outcome.config)


def evaluate(
    model: str = "zoo/student",
    *,
    adapter: str | Iterable[str] | None = None,
    tasks: Iterable[str] = ("mmlu",),
    local: bool = False,
    **settings: _Values,
) -> pd.DataFrame:
    """Scores of a model, or of adapters of it, as percentages; of a corpus, perplexities.

    The table has a row for each of them and a column for each (split, task).

    `settings` are those of `ray_jobs/evaluate.py`, such as `splits`, `protocol` or `root`. Every
    answer is kept in the work folder and found again. **Raises** `UserError` for bad input.
    """
    from semalign.engine.scoring import run_evaluation

    adapters = adapter if adapter is None or isinstance(adapter, str) else tuple(adapter)
    tree = expand({**settings, "model": model, "adapter": adapters, "tasks": tuple(tasks)})
    scored = run_evaluation(validate(tree, EvaluationJob), local=local)
    return _table(scored.scores)


def _table(scores: Mapping[tuple[str, str, str], Score]) -> pd.DataFrame:
    import pandas as pd

    from semalign.report.table import shown

    rows: dict[str, dict[tuple[str, str], float]] = {}
    for (candidate, task, split), score in scores.items():
        rows.setdefault(candidate, {})[split, task] = shown(score.value)
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.columns = pd.MultiIndex.from_tuples(frame.columns, names=["split", "task"])
    return frame


def _models(config: Config) -> tuple[Model, Model]:
    """Student and teacher by reference."""
    student, teacher = (
        Model.open(path, dtype=config.dtype) for path in (config.student, config.teacher)
    )
    return student, teacher


def _shared(student: Model, teacher: Model) -> Any:
    from semalign.models.loading import load_tokenizer
    from semalign.models.vocabulary import vocabulary_overlap

    return vocabulary_overlap(
        load_tokenizer(student.path),
        load_tokenizer(teacher.path),
        student_rows=student.config.vocab_size,
        teacher_rows=teacher.config.vocab_size,
    )
