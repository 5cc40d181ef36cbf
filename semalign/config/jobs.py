"""What can be submitted: a transfer, an evaluation, an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from semalign.config.dotted import flat, nested
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
from semalign.names import sqlite_uri

PLUGIN_FILES = (".py", ".yaml", ".yml")


def is_task_file(task: Any) -> bool:
    """Whether a task is named by its file, such as `tasks/reviews.yaml`."""
    return isinstance(task, str) and task.endswith(PLUGIN_FILES) and ":" not in task


def task_name(task: Any) -> Any:
    """The name that a task goes by: of a file, its own without the suffix."""
    return Path(task).stem if is_task_file(task) else task


def _resolved(folder: str) -> str:
    return str(Path(folder).expanduser().resolve())


def _plugin(name: str) -> str:
    return _resolved(name) if name.endswith(PLUGIN_FILES) else name


PluginName = Annotated[str, AfterValidator(_plugin)]


class Job(Settings):
    """What every kind of job has: how models are loaded, where results go, and where it runs.

    A task that is named by its file is a plugin, and goes by the file's name without its suffix.
    """

    task_settings: ClassVar[tuple[str, ...]] = ()  # those whose values are names of tasks

    dtype: Dtype = "float32"
    """Number format that models are loaded and run in."""
    trust_remote_code: Annotated[bool, RUNTIME] = False
    """Run code that a checkpoint brings with it."""
    workdir: Annotated[str, AfterValidator(_resolved), Field(validate_default=True), RUNTIME] = (
        "work"
    )
    """Work folder, which holds all results; on a cluster, on storage that all nodes share."""
    plugins: Annotated[tuple[PluginName, ...], RUNTIME] = ()
    """Modules (dotted names or Python files) that register methods, pairing strategies, objectives,
    maps or tasks, and task files (YAML); imported in every process."""
    tracking: Annotated[Tracking, RUNTIME] = Field(default_factory=Tracking)
    cluster: Annotated[Cluster, RUNTIME] = Field(default_factory=Cluster)

    @model_validator(mode="before")
    @classmethod
    def _register_task_files(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        settings, files = flat(tree), []
        for name in cls.task_settings:
            value = settings.get(name)
            given = list(value) if isinstance(value, list | tuple) else [value]
            files += [task for task in given if is_task_file(task)]
            if isinstance(value, list | tuple):
                settings[name] = type(value)(task_name(task) for task in value)
            elif is_task_file(value):
                settings[name] = task_name(value)
        if not files:
            return tree
        plugins = [*(settings.get("plugins") or ()), *files]
        return nested({**settings, "plugins": tuple(dict.fromkeys(plugins))})

    @property
    def work(self) -> Path:
        return Path(self.workdir)

    @property
    def tracking_uri(self) -> str:
        return self.tracking.uri or sqlite_uri(self.work / "mlflow.db")


class Config(Job):
    """One transfer, wholly described."""

    task_settings = ("data.task", "evaluation.tasks")

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

    def scored_by(self, **settings: Any) -> Config:
        """The same with other settings of the evaluation."""
        evaluation = self.evaluation.model_copy(update=settings)
        return self.model_copy(update={"evaluation": evaluation})


class EvaluationJob(Evaluation, Job):
    """One evaluation by itself: a model, or adapters of it, and everything of `Evaluation`."""

    task_settings = ("tasks",)

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
    """Folder of the splits, the file of one, or `hub` for the published data on the Hugging Face
    hub."""

    @property
    def adapters(self) -> tuple[str, ...]:
        return (self.adapter,) if isinstance(self.adapter, str) else self.adapter or ()


class AnalysisJob(Job):
    """One figure of the paper's analysis. A setting that the figure does not use is refused."""

    task_settings = ("task",)

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
    batch_size: Annotated[int, Field(ge=1), RUNTIME] = 8
    """Examples in a forward pass."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the random directions and of the tokens that are drawn."""
    num_cpus: Annotated[float, Field(gt=0), RUNTIME] = 1
    """CPUs of the Ray task that measures."""
    num_gpus: Annotated[float, Field(ge=0), RUNTIME] = 0
    """GPUs of the Ray task that measures."""
    device_map: Annotated[str | None, RUNTIME] = None
    """How Accelerate spreads the models over the GPUs, such as auto; null: one device."""
