"""What can be submitted: a transfer, an evaluation, an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from semalign.config.sections import (
    RUNTIME,
    Alignment,
    Attribution,
    Cluster,
    Data,
    Dtype,
    Evaluation,
    Extraction,
    Laten,
    Loss,
    Pairing,
    Place,
    Seeking,
    Settings,
    Tracking,
    Training,
)

LARGEST_RANK = 512  # of a LoRA that vLLM serves


def _resolved(folder: str) -> str:
    return str(Path(folder).expanduser().resolve())


class Job(Settings):
    """What every kind of job has: how models are loaded, where results go, and where it runs."""

    dtype: Dtype = "float32"
    """Number format that models are loaded and run in."""
    trust_remote_code: Annotated[bool, RUNTIME] = False
    """Run code that a checkpoint brings with it."""
    workdir: Annotated[str, AfterValidator(_resolved), Field(validate_default=True), RUNTIME] = (
        "work"
    )
    """Work folder, which holds all results; on a cluster, on storage that all nodes share."""
    tracking: Annotated[Tracking, RUNTIME] = Field(default_factory=Tracking)
    cluster: Annotated[Cluster, RUNTIME] = Field(default_factory=Cluster)

    @property
    def work(self) -> Path:
        return Path(self.workdir)

    @property
    def tracking_uri(self) -> str:
        return self.tracking.uri or f"sqlite:///{self.work / 'mlflow.db'}"


class Config(Job):
    """One transfer, wholly described."""

    method: str = "semalign"
    """How the student learns: semalign; the baselines seeking and laten; the controls sft
    (cross-entropy alone on the same layers), sft-all (on all layers) and logit-kd (cross-entropy
    and KL to the teacher's output); or a registered method."""
    teacher: Place = "zoo/teacher"
    """Teacher: a folder, a hub id, or a shipped model."""
    student: Place = "zoo/student"
    """Student: a folder, a hub id, or a shipped model."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""
    data: Data = Field(default_factory=Data)
    attribution: Attribution = Field(default_factory=Attribution)
    pairing: Pairing = Field(default_factory=Pairing)
    extraction: Extraction = Field(default_factory=Extraction)
    alignment: Alignment = Field(default_factory=Alignment)
    loss: Loss = Field(default_factory=Loss)
    training: Training = Field(default_factory=Training)
    seeking: Seeking = Field(default_factory=Seeking)
    laten: Laten = Field(default_factory=Laten)
    evaluation: Evaluation = Field(default_factory=Evaluation)

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
    """One evaluation by itself: a model, or adapters of it, and everything of `Evaluation`."""

    model: Place = "zoo/student"
    """Model that is scored: a folder, a hub id, or a shipped model."""
    adapter: Place | tuple[Place, ...] | None = None
    """LoRA adapter in PEFT's layout, or a list of them, scored on the model; null: the model
    alone."""
    baseline: bool = False
    """Score the model without adapters too, and compare every adapter with it."""
    splits: tuple[str, ...] = ("test",)
    """Splits that the model is scored on."""
    root: Place = "zoo/data"
    """Folder of the splits, or `hub` for the published data on the Hugging Face hub."""

    @property
    def adapters(self) -> tuple[str, ...]:
        return (self.adapter,) if isinstance(self.adapter, str) else self.adapter or ()


class AnalysisJob(Job):
    """One figure of the paper's analysis. A setting that the figure does not use is refused."""

    figure: str = "decomposition"
    """Figure: decomposition (Figure 2), similarity (Figure 4), attribution of the layers, or a
    registered one."""
    model: Place = "zoo/student"
    """Model of the decomposition."""
    teacher: Place = "zoo/teacher"
    """Teacher of similarity and attribution."""
    student: Place = "zoo/student"
    """Student of similarity."""
    adapter: Place | None = None
    """LoRA adapter in PEFT's layout; similarity then measures the student with it too; null:
    none."""
    alignment: Alignment = Field(default_factory=Alignment)
    positions: Annotated[int, Field(ge=4)] = 4096
    """Most tokens that similarity measures."""
    root: Place = "zoo/data"
    """Folder of the splits, or `hub` for the published data on the Hugging Face hub."""
    task: str = "humaneval"
    """Task whose examples are measured."""
    split: str = "extract"
    """Split whose examples are measured."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Measure the first so many examples of the split; null: all of them."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest example in tokens; a longer one loses its end."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Examples in a forward pass."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the random directions and of the tokens that are drawn."""
    num_cpus: Annotated[float, Field(gt=0), RUNTIME] = 1
    """CPUs of the Ray task that measures."""
    num_gpus: Annotated[float, Field(ge=0), RUNTIME] = 0
    """GPUs of the Ray task that measures."""
    device_map: Annotated[str | None, RUNTIME] = None
    """How Accelerate spreads the models over the GPUs, such as auto; null: one device."""
