"""Every setting of a transfer: typed, frozen, described; unknown keys are refused.

A configuration is made of layers, later ones winning: the defaults below, YAML files, and dotted
overrides from the command line (`pairing.strategy=interpolated loss.alpha=0.3`).

Layer numbers in a configuration are the paper's: 1 is the shallowest layer. The names of methods,
tasks, strategies, objectives, maps and protocols are text here; what is registered decides which
of them are valid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

Interface = Literal["mlp", "attn", "both"]
Positions = Literal["all", "answer"]
Dtype = Literal["float32", "bfloat16", "float16"]
Layer = Annotated[int, Field(ge=1)]


ROW_FILES = (".jsonl", ".jsonl.gz", ".parquet")  # suffixes of files of rows


class Runtime:
    """Marks a setting, or a section of them, that decides whether, where and how fast a run goes,
    and nothing of what comes out. It has no part in any identity.
    """

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Any:
        return {**handler(core), "runtime": True}


RUNTIME = Runtime()


def _absolute(place: str) -> str:
    """A folder that exists, by its absolute path: Ray's processes have other working folders.
    What semalign ships, and what is on a hub, keeps its name.
    """
    folder = Path(place).expanduser()
    shipped = place.startswith("zoo/") or place == "hub"
    return str(folder.resolve()) if folder.is_dir() and not shipped else place


Place = Annotated[str, AfterValidator(_absolute)]


def _split(name: str) -> str:
    return str(Path(name).expanduser().resolve()) if name.endswith(ROW_FILES) else name


SplitName = Annotated[str, AfterValidator(_split)]


class Settings(BaseModel):
    """Base of every section: keyword-only, frozen, no unknown keys.

    The docstring below a setting is its description, in the command's help and in
    docs/settings.md. Validators are built when a section is first made, for the help needs none.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
        defer_build=True,
    )


class Data(Settings):
    """The examples: `<root>/<task>/<split>.jsonl`, in the published schemas."""

    root: Place = "zoo/data"
    """Folder of the splits, the file of one, or `hub` for the published data on the Hugging Face
    hub."""
    task: str = "mmlu"
    """Task that is transferred: mmlu, gsm8k, humaneval, mbpp, a task file such as reviews.yaml, or
    a registered one."""
    train_split: SplitName = "train"
    """Split that the student is trained on, by its name or its file."""
    attribution_split: SplitName = "extract"
    """Split that the teacher's layers are attributed on, by its name or its file; some dozen rows
    are enough."""
    train_limit: Annotated[int, Field(ge=1)] | None = None
    """Train on the first so many rows of the training split; null: all of them."""
    labelled_limit: Annotated[int, Field(ge=1)] | None = None
    """Only the first so many training rows keep their answers, the others are prompts without
    cross-entropy; null: all of them."""
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the labelled rows that are given another row's answer, the same rows for every
    seed."""
    shared_with: Annotated[tuple[str, ...], RUNTIME] = ()
    """Reported splits that may share rows with those that are trained on; others are refused."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest example in tokens; a longer one loses its end."""


class Attribution(Settings):
    """Which teacher layers carry the task (section 4.1)."""

    granularity: Literal["block", "attn", "mlp"] = "block"
    """Part of a layer whose output is attributed: the whole block, attention or MLP."""
    aggregation: Literal["abs_sum", "sum"] = "abs_sum"
    """How gradient x activation is added up over tokens and channels: by magnitude, or signed."""
    top_n: Annotated[int, Field(ge=1)] = 1
    """Number of critical layers; each is paired with a student layer."""
    batch_size: Annotated[int, Field(ge=1), RUNTIME] = 8
    """Examples in a forward and backward pass of the teacher."""


class Pairing(Settings):
    """Which student layer learns from which teacher layer (section 4.1)."""

    strategy: str = "proportional"
    """Pairing strategy: proportional (the paper's), attributed, interpolated, cka, explicit, the
    controls last, random and reverse, or a registered one."""
    explicit: tuple[tuple[Layer, Layer], ...] | None = None
    """Pairs (teacher layer, student layer) counted from 1, for `pairing.strategy=explicit`;
    null: none."""


class Extraction(Settings):
    """The stored hidden states of the teacher, and the actors that compute them."""

    interface: Interface = "mlp"
    """Sublayer whose output supervises the student: mlp, attn, or both."""
    positions: Positions = "all"
    """Tokens that are supervised: all, or those that predict the answer."""
    layers: tuple[Layer, ...] = ()
    """Teacher layers, counted from 1, to store in addition to those of the pairs."""
    dtype: Dtype = "bfloat16"
    """Number format of the stored activations."""
    store: Annotated[str | None, RUNTIME] = None
    """Folder of the activation store; null: one in the work folder, named by its content."""
    shard_examples: Annotated[int, Field(ge=1), RUNTIME] = 256
    """Examples in a file of the store; a run that was killed goes on at the first missing file."""
    batch_tokens: Annotated[int, Field(ge=1), RUNTIME] = 4096
    """Tokens in a forward pass, padding included; a longer example is a pass of its own."""
    num_actors: Annotated[int, Field(ge=1), RUNTIME] = 1
    """Ray actors that compute activations, each with a copy of the model."""
    num_cpus: Annotated[float, Field(gt=0), RUNTIME] = 1
    """CPUs of each actor."""
    num_gpus: Annotated[float, Field(ge=0), RUNTIME] = 0
    """GPUs of each actor."""
    device_map: Annotated[str | None, RUNTIME] = None
    """How Accelerate spreads the model over an actor's GPUs, such as auto; null: one device."""
    max_restarts: Annotated[int, Field(ge=0), RUNTIME] = 2
    """How often an actor that died is started again."""


class Alignment(Settings):
    """From the teacher's space to the student's (Eq. 1-2)."""

    map: str = "cosine"
    """Map of the teacher's activations: cosine (Eq. 1-2), dual (least squares of the teacher's
    logits), or a registered one."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Keep only so many of the strongest coefficients of a token; null: all of them."""
    min_overlap: Annotated[float, Field(ge=0, le=1), RUNTIME] = 0.9
    """Least share of the smaller vocabulary of the two that the other model must have too."""
    unaligned: Annotated[Literal["drop", "refuse"], RUNTIME] = "drop"
    """A row whose text the two tokenizers read differently, so that no position of its answer is
    aligned: drop leaves it out and counts it, refuse is an error."""


class Loss(Settings):
    """alpha * L_align + beta * L_CE + gamma * L_KL (Eq. 5, where gamma is 0). A weight of 0
    switches its term off: nothing of it is computed, nor what only it needs of the teacher.

    The paper gives no values. On the shipped family's dev split every alpha of 0.1 and more was
    below cross-entropy alone under the cosine map, the more the larger (see docs/effect.md).
    """

    objective: str = "cosine"
    """Alignment term between the outputs of the paired sublayers: cosine (Eq. 3), fisher (logits
    in the metric of the teacher's softmax), geometry (distances between tokens), or a registered
    one."""
    alpha: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the alignment term."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy."""
    gamma: Annotated[float, Field(ge=0)] = 0.0
    """Weight of KL(teacher || student) at the output, at the supervised tokens."""


class Lora(Settings):
    """The LoRA adapter of the trained layers."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the two factors."""
    alpha: Annotated[int, Field(ge=1)] | None = None
    """Numerator of the scaling alpha / rank; null: twice the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the adapter's input."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "up_proj",
        "down_proj",
        "v_proj",
        "o_proj",
    )
    """Linear modules of a trained layer that get an adapter."""

    @property
    def scaling_alpha(self) -> int:
        return 2 * self.rank if self.alpha is None else self.alpha


class Training(Settings):
    """The update of the paired student layers (section 4.3)."""

    adapter: Literal["lora", "full"] = "lora"
    """What is trained: a LoRA adapter, or all weights of the layer."""
    lora: Lora = Field(default_factory=Lora)
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Passes through the training rows; null: Table 5's of the task (3 for humaneval, else 5)."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of AdamW; null: Table 5's of the task (3e-5 for humaneval, else 3e-4)."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Examples in an optimiser step, over all workers."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 16
    """Examples that a worker computes at a time; gradients are added up to `batch_size`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises to its peak."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm that the gradient is clipped to."""
    num_workers: Annotated[int, Field(ge=1), RUNTIME] = 1
    """Ray Train workers that share each batch."""
    cpus_per_worker: Annotated[float, Field(gt=0), RUNTIME] = 1
    """CPUs of each worker."""
    use_gpu: Annotated[bool, RUNTIME] = False
    """Give each worker a GPU."""
    max_failures: Annotated[int, Field(ge=0), RUNTIME] = 2
    """How often a training goes on from its last epoch after a worker died."""


class Seeking(Settings):
    """Seeking (Zhong et al., 2024): the teacher's most sensitive blocks as initial LoRA factors."""

    layers: Annotated[int, Field(ge=1)] | None = None
    """Number of teacher layers that are kept; null: as many as the student has."""
    modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Modules that get factors; with embed_tokens or lm_head, as the authors do, a merged
    checkpoint comes out."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the factors; the adapter that comes out has twice that."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout of the adapter's input in training."""
    subtract: Literal["low_rank", "block"] = "low_rank"
    """What is taken away at the start so that the student begins as itself: the low-rank product
    (the authors' code) or the whole extracted block (the paper's appendix B.1)."""


class Laten(Settings):
    """LaTen (Tan et al., 2025): neurons located in both models, translated by a hypernetwork."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Neurons of a layer that are translated, as a share of the student's widths."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """Number of layers of each model that are paired; null: as many as the student has."""
    align_split: str = "align"
    """Split that fills the pools of the training steps."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Training steps, each with one attribution row; null: Table 4's of the task, at most the
    attribution rows."""
    cycle: Annotated[int, Field(ge=1)] | None = None
    """Steps of the OneCycle schedule, of which the first `steps` are made; null: the number of
    attribution rows, as the authors do."""
    pool: Annotated[int, Field(ge=2)] = 16
    """Rows in a step: the attribution row and others of `align_split`."""
    lr: Annotated[float, Field(gt=0)] = 3e-5
    """Peak learning rate of OneCycle."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay of AdamW."""
    size_penalty: Annotated[float, Field(ge=0)] = 1000.0
    """Weight of the mean squared change of the student's weights in the loss."""
    readout: Literal["correct", "as_coded"] = "correct"
    """Normalisation of the logits that locate neurons: the model's own, or the authors' code."""


class Sandbox(Settings):
    """Where generated programs run; their limits are the protocol's."""

    min_tier: Annotated[int, Field(ge=1, le=3)] = 2
    """Weakest isolation that is accepted: tier 1 isolates most, 3 least."""
    num_workers: Annotated[int, Field(ge=1), RUNTIME] = 8
    """Programs that run at a time."""


class Sampling(Settings):
    """Samples of every code item instead of the protocol's own number, scored as pass@k."""

    n: Annotated[int, Field(ge=1)] = 20
    """Samples of each item."""
    temperature: Annotated[float, Field(ge=0)] = 0.1
    """Temperature of the samples; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the probability that nucleus sampling draws from."""
    k: Annotated[int, Field(ge=1)] = 1
    """The k of pass@k, at most n."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Sampling:
        if self.k > self.n:
            raise ValueError(f"pass@{self.k} needs at least k={self.k} samples, found n={self.n}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n={self.n} samples at temperature 0 are all the same")
        return self


class Evaluation(Settings):
    """What is scored, how, and the vLLM engines that generate."""

    tasks: tuple[str, ...] = ("mmlu", "gsm8k", "humaneval", "mbpp")
    """Tasks that the models are scored on: registered ones, task files such as reviews.yaml, and
    lm_eval's as lm_eval:arc_easy."""
    splits: tuple[str, ...] = ("test",)
    """Splits that the models are scored on; of a sweep those that it selects by and reports."""
    root: Place | None = None
    """Folder of the splits that are scored, the file of one, or `hub` for the published data; null:
    `data.root`."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Score only so many items of each split, the first ones unless `limit_seed` is given; null:
    all of them."""
    limit_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed that draws the items of `limit`; null: the first ones."""
    protocol: str = "paper"
    """Protocol, the named way to prompt, decode and judge: paper, paper-chat, open-instruct,
    lm-eval, or a registered one; an older version by its number, such as paper-1."""
    sampling: Sampling | None = None
    """Samples of every code item; null: the protocol's own."""
    num_engines: Annotated[int, Field(ge=1), RUNTIME] = 1
    """Number of vLLM engines of a model."""
    num_cpus: Annotated[float, Field(gt=0), RUNTIME] = 1
    """CPUs of each engine."""
    num_gpus: Annotated[float, Field(ge=0), RUNTIME] = 0
    """GPUs of each of an engine's ranks, of which it has `tensor_parallel_size`; 0: on CPUs."""
    tensor_parallel_size: Annotated[int, Field(ge=1), RUNTIME] = 1
    """Ranks that an engine splits the model over."""
    max_model_len: Annotated[int, Field(ge=16)] = 1024
    """Longest prompt and completion together, in tokens; a longer prompt is cut at its start."""
    kv_cache_gb: Annotated[float, Field(gt=0), RUNTIME] = 1.0
    """Memory of an engine's key-value cache, in GiB; used on CPUs alone."""
    max_restarts: Annotated[int, Field(ge=0), RUNTIME] = 2
    """How often an engine that died is started again."""
    batch_items: Annotated[int, Field(ge=1), RUNTIME] = 200
    """Items in a request to an engine; they are kept once all of them are judged."""
    sandbox: Sandbox = Field(default_factory=Sandbox)

    @property
    def limited(self) -> str:
        """Which items are scored, for people: `first 100 items`; empty where all are."""
        if self.limit is None:
            return ""
        if self.limit_seed is None:
            return f"first {self.limit} items"
        return f"{self.limit} random items, seed {self.limit_seed}"


class Tracking(Settings):
    """MLflow."""

    uri: str | None = None
    """MLflow's tracking URI; null: MLFLOW_TRACKING_URI, or else `<workdir>/mlflow.db`."""
    experiment: str = "semalign"
    """MLflow experiment; MLFLOW_EXPERIMENT_NAME, where it is set, is the default."""
    run_name: str | None = None
    """Name of the MLflow run; null: of the task and the method."""


class Cluster(Settings):
    """The Ray cluster."""

    address: str | None = None
    """Cluster to join, as ray.init takes it (auto: the one on this machine); null: that of
    RAY_ADDRESS, or else a local one for this run."""
    autoscaling: bool = False
    """Wait for nodes that do not exist yet, instead of refusing to run."""
