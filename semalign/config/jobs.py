"""What can be submitted: a transfer, an evaluation, an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from semalign.config.sections import (
    Alignment,
    Attribution,
    Cluster,
    Data,
    Dtype,
    Evaluation,
    Extraction,
    Laten,
    Loss,
    Method,
    Pairing,
    Place,
    Seeking,
    Settings,
    TaskName,
    Tracking,
    Training,
)

LARGEST_RANK = 512  # of a LoRA that vLLM serves


class Job(Settings):
    """What every kind of job has: how models are loaded, where results go, and where it runs."""

    dtype: Dtype = "float32"
    trust_remote_code: bool = False
    workdir: str = "work"
    tracking: Tracking = Tracking()
    cluster: Cluster = Cluster()

    @property
    def work(self) -> Path:
        return Path(self.workdir)

    @property
    def tracking_uri(self) -> str:
        return self.tracking.uri or f"sqlite:///{self.work / 'mlflow.db'}"


class Config(Job):
    """One transfer, wholly described.

    `method` is SemAlign, a baseline (`seeking`, `laten`) or a control: cross-entropy alone on the
    same layer (`sft`), on all layers (`sft-all`), or cross-entropy and the teacher's output on the
    same layer (`logit-kd`). All methods but SemAlign have no alignment term, whatever `loss.alpha`
    says, and `logit-kd` alone has the teacher's output.
    """

    method: Method = "semalign"
    teacher: Place = "zoo/teacher"
    student: Place = "zoo/student"
    seed: Annotated[int, Field(ge=0)] = 0
    data: Data = Data()
    attribution: Attribution = Attribution()
    pairing: Pairing = Pairing()
    extraction: Extraction = Extraction()
    alignment: Alignment = Alignment()
    loss: Loss = Loss()
    training: Training = Training()
    seeking: Seeking = Seeking()
    laten: Laten = Laten()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="before")
    @classmethod
    def _method_decides_loss(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping) or tree.get("method", "semalign") == "semalign":
            return tree
        loss = tree.get("loss") or {}
        if not isinstance(loss, Mapping):
            return tree
        gamma = (loss.get("gamma") or 1.0) if tree["method"] == "logit-kd" else 0.0
        return {**tree, "loss": {**loss, "alpha": 0.0, "gamma": gamma}}

    @model_validator(mode="after")
    def _served(self) -> Config:
        if (self.adapter_rank or 0) > LARGEST_RANK:
            raise ValueError(
                f"{'seeking.rank' if self.method == 'seeking' else 'training.lora.rank'}: the "
                f"adapter would have rank {self.adapter_rank}; expected at most {LARGEST_RANK}, "
                "the largest that vLLM serves"
            )
        return self

    @property
    def pairs_layers(self) -> bool:
        """Whether the method trains the layers that are paired, and not the whole student."""
        return self.method in ("semalign", "sft", "logit-kd")

    @property
    def adapter_rank(self) -> int | None:
        """Of the LoRA adapter that comes out; None when it is a whole student."""
        if self.method == "seeking":
            whole = {"embed_tokens", "lm_head"}.intersection(self.seeking.modules)
            # the trained product, and the one that is taken away
            return None if whole or self.seeking.subtract == "block" else 2 * self.seeking.rank
        if self.method == "laten" or self.training.adapter == "full":
            return None
        return self.training.lora.rank

    @property
    def epochs(self) -> int:
        """Table 5, unless given."""
        return self.training.epochs or (3 if self.data.task == "humaneval" else 5)

    @property
    def lr(self) -> float:
        """Table 5, unless given."""
        return self.training.lr or (3e-5 if self.data.task == "humaneval" else 3e-4)

    @property
    def interfaces(self) -> tuple[str, ...]:
        both = self.extraction.interface == "both"
        return ("attn", "mlp") if both else (self.extraction.interface,)


class EvaluationJob(Evaluation, Job):
    """One evaluation by itself: a model, or adapters of it, and everything of `Evaluation`.

    With `baseline` the bare model is scored too, and every adapter compared with it.
    """

    model: Place = "zoo/student"
    adapter: Place | tuple[Place, ...] | None = None
    baseline: bool = False
    splits: tuple[str, ...] = ("test",)
    root: Place | None = "zoo/data"

    @property
    def adapters(self) -> tuple[str, ...]:
        return (self.adapter,) if isinstance(self.adapter, str) else self.adapter or ()


class AnalysisJob(Job):
    """One figure of the paper's analysis, of the models and examples named here.

    `decomposition` (Figure 2) looks at `model`; `similarity` (Figure 4) at `teacher` and `student`,
    and at the student with `adapter`, a LoRA in PEFT's layout; `attribution` at `teacher`. Of
    `alignment` only similarity asks, which measures at most `positions` tokens. `batch_size`
    examples are computed at a time. A key that the figure does not use is refused.
    """

    figure: Literal["decomposition", "similarity", "attribution"] = "decomposition"
    model: Place = "zoo/student"
    teacher: Place = "zoo/teacher"
    student: Place = "zoo/student"
    adapter: Place | None = None
    alignment: Alignment = Alignment()
    positions: Annotated[int, Field(ge=4)] = 4096
    root: Place = "zoo/data"
    task: TaskName = "humaneval"
    split: str = "extract"
    limit: Annotated[int, Field(ge=1)] | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    batch_size: Annotated[int, Field(ge=1)] = 8
    seed: Annotated[int, Field(ge=0)] = 0
    num_cpus: Annotated[float, Field(gt=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    device_map: str | None = None
