"""Every setting of a transfer: typed, frozen, unknown keys refused.

A configuration is made of three layers, later ones winning: the defaults below, YAML files, and
dotted overrides from the command line (`pairing.strategy=interpolated loss.alpha=0.3`).

Layer numbers in a configuration are the paper's: 1 is the shallowest layer.
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

TaskName = Literal["mmlu", "gsm8k", "humaneval", "mbpp"]
Interface = Literal["mlp", "attn", "both"]
Positions = Literal["all", "answer"]
Objective = Literal["cosine", "fisher", "geometry"]
Method = Literal["semalign", "seeking", "laten", "sft", "sft-all", "logit-kd"]
Dtype = Literal["float32", "bfloat16", "float16"]
Layer = Annotated[int, Field(ge=1)]


def _absolute(place: str) -> str:
    """A folder that is there, by its absolute path: Ray's processes have other working folders.
    What semalign ships, and what is on a hub, keeps its name.
    """
    folder = Path(place).expanduser()
    shipped = place.startswith("zoo/") or place == "hub"
    return str(folder.resolve()) if folder.is_dir() and not shipped else place


Place = Annotated[str, AfterValidator(_absolute)]


class Settings(BaseModel):
    """Base of every section: keyword-only, frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Data(Settings):
    """Where the examples are: `<root>/<task>/<split>.jsonl`, in the published schemas.

    Of the training examples the first `labelled_limit` carry their answers, the others are prompts
    only: nothing of L_CE; of L_align and L_KL the prompt's positions, or with `positions: answer`
    its last one. `label_noise` is the share of the labelled ones that are given the answer of
    another example, the same ones for every `seed`.
    """

    root: Place = "zoo/data"
    task: TaskName = "mmlu"
    train_split: str = "train"
    attribution_split: str = "extract"
    train_limit: Annotated[int, Field(ge=1)] | None = None
    labelled_limit: Annotated[int, Field(ge=1)] | None = None
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_length: Annotated[int, Field(ge=2)] = 1024


class Attribution(Settings):
    """Which teacher layers carry the task (section 4.1)."""

    granularity: Literal["block", "attn", "mlp"] = "block"
    aggregation: Literal["abs_sum", "sum"] = "abs_sum"
    top_n: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 8


class Pairing(Settings):
    """Which student layer learns from which teacher layer (section 4.1).

    Strategies: `attributed`, `proportional`, `interpolated`, `cka` (the student layer most similar
    to the critical teacher layer), `explicit`; controls `last`, `random`, `reverse`.
    """

    strategy: str = "attributed"
    explicit: tuple[tuple[Layer, Layer], ...] | None = None


class Extraction(Settings):
    """What of the teacher is stored, and the actors that compute it.

    `layers` stores teacher layers beside the ones the pairs need; `store` names a folder instead of
    the one derived from the content.
    """

    interface: Interface = "mlp"
    positions: Positions = "all"
    layers: tuple[Layer, ...] = ()
    dtype: Dtype = "bfloat16"
    store: str | None = None
    shard_examples: Annotated[int, Field(ge=1)] = 256
    batch_tokens: Annotated[int, Field(ge=1)] = 4096
    num_actors: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(gt=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    device_map: str | None = None
    max_restarts: Annotated[int, Field(ge=0)] = 2


class Alignment(Settings):
    """From the teacher's space to the student's (Eq. 1-2); `top_k` keeps the k strongest atoms."""

    map: Literal["cosine", "dual"] = "cosine"
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_overlap: Annotated[float, Field(ge=0, le=1)] = 0.9

    @model_validator(mode="after")
    def _top_k_needs_coefficients(self) -> Alignment:
        if self.top_k is not None and self.map == "dual":
            raise ValueError("top_k chooses among Eq. 1's coefficients: it needs map=cosine")
        return self


class Loss(Settings):
    """alpha * L_align + beta * L_CE + gamma * L_KL (Eq. 5 with gamma 0). A zero weight switches the
    term off: nothing of it is computed, nor of the teacher what only it needs.

    `objective` is L_align, between the student's sublayer and the teacher's: `cosine` (Eq. 3),
    `fisher` (the distance of what the LM heads read from them, in the metric of the teacher's
    softmax; needs no map) or `geometry` (the distances between the tokens of a sequence). L_KL is
    KL(teacher || student) at the output, where L_align looks (`extraction.positions`).

    The paper gives no values. On the shipped family's dev split every alpha of 0.1 and more was
    below cross-entropy alone under the cosine map, the more the larger (see docs/effect.md).
    """

    objective: Objective = "cosine"
    alpha: Annotated[float, Field(ge=0)] = 0.1
    beta: Annotated[float, Field(ge=0)] = 1.0
    gamma: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _something_to_learn(self) -> Loss:
        if self.alpha == self.beta == self.gamma == 0:
            raise ValueError("alpha, beta and gamma are all 0: there is nothing to learn")
        return self

    @property
    def uses_map(self) -> bool:
        """Whether the teacher's rows have to be brought to the student's space."""
        return self.alpha > 0 and self.objective != "fisher"

    @property
    def uses_teacher_head(self) -> bool:
        """Whether the teacher's logits are made while the student is trained."""
        return self.gamma > 0 or (self.alpha > 0 and self.objective == "fisher")


class Lora(Settings):
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[int, Field(ge=1)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "up_proj",
        "down_proj",
        "v_proj",
        "o_proj",
    )

    @property
    def scaling_alpha(self) -> int:
        return 2 * self.rank if self.alpha is None else self.alpha


class Training(Settings):
    """The single-layer update (section 4.3); `epochs` and `lr` default to Table 5 by task.

    `batch_size` is the global batch: it does not depend on the number of workers.
    """

    adapter: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()
    epochs: Annotated[int, Field(ge=1)] | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 64
    micro_batch_size: Annotated[int, Field(ge=1)] = 16
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    num_workers: Annotated[int, Field(ge=1)] = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=0)] = 2


class Seeking(Settings):
    """Seeking (Zhong et al., 2024): the teacher's most sensitive blocks as initial LoRA factors.

    `layers` of the teacher are kept, by default as many as the student has. `modules` may add
    `embed_tokens` and `lm_head`, as the authors do; what comes out is then a merged checkpoint.
    `subtract` is what injection takes away so that the student starts as itself: the `low_rank`
    product (the authors' code) or the whole extracted `block` (the paper's appendix B.1).
    `training.adapter` and `training.lora` are for the other methods.
    """

    layers: Annotated[int, Field(ge=1)] | None = None
    modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    rank: Annotated[int, Field(ge=1)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    subtract: Literal["low_rank", "block"] = "low_rank"

    @property
    def factor_settings(self) -> dict[str, Any]:
        """What of it decides the factors: all but the dropout of their training."""
        return self.model_dump(exclude={"dropout"})


class Laten(Settings):
    """LaTen (Tan et al., 2025): neurons located in both models, translated by a hypernetwork.

    `share` of the student's width is the number of neurons a layer. `steps` defaults to Table 4 by
    task, whose Align Size is `steps` x `pool`, or to the attribution split's number of rows where
    that is smaller; each takes one of these rows, to locate neurons in both models, and `pool` - 1
    of `align_split`. `readout` is the one that the attribution means, or the authors' `as_coded`.
    The learning rate is OneCycle's over `cycle` steps (the authors': all examples of the
    attribution split), of which only the first `steps` are made.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    layers: Annotated[int, Field(ge=1)] | None = None
    align_split: str = "align"
    steps: Annotated[int, Field(ge=1)] | None = None
    cycle: Annotated[int, Field(ge=1)] | None = None
    pool: Annotated[int, Field(ge=2)] = 16
    lr: Annotated[float, Field(gt=0)] = 3e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    size_penalty: Annotated[float, Field(ge=0)] = 1000.0
    readout: Literal["correct", "as_coded"] = "correct"


class Sandbox(Settings):
    """Where generated code runs: never below tier `min_tier` (1 isolates most, 3 least). Programs
    mostly wait for the system to start them, so `num_workers` of them run at a time. Their limits
    are the protocol's.
    """

    min_tier: Annotated[int, Field(ge=1, le=3)] = 2
    num_workers: Annotated[int, Field(ge=1)] = 8


class Sampling(Settings):
    """`n` samples of every code item instead of the protocol's own number, scored as pass@k."""

    n: Annotated[int, Field(ge=1)] = 20
    temperature: Annotated[float, Field(ge=0)] = 0.1
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    k: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _enough_samples(self) -> Sampling:
        if self.k > self.n:
            raise ValueError(f"pass@{self.k} needs at least k={self.k} samples, found n={self.n}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n={self.n} samples at temperature 0 are all the same")
        return self


class Evaluation(Settings):
    """What is scored, how (`protocol`), and the vLLM engines that generate.

    `root` is a folder of splits, or `hub` for the published ones on the Hugging Face hub.
    """

    tasks: tuple[TaskName, ...] = ("mmlu", "gsm8k", "humaneval", "mbpp")
    splits: tuple[str, ...] = ("dev", "test")
    root: Place | None = None
    protocol: str = "paper"
    sampling: Sampling | None = None
    num_engines: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(gt=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    max_model_len: Annotated[int, Field(ge=16)] = 1024
    kv_cache_gb: Annotated[float, Field(gt=0)] = 1.0
    max_restarts: Annotated[int, Field(ge=0)] = 2
    batch_items: Annotated[int, Field(ge=1)] = 200
    sandbox: Sandbox = Sandbox()


class Tracking(Settings):
    """MLflow. The default database is `<workdir>/mlflow.db`."""

    uri: str | None = None
    experiment: str = "semalign"
    run_name: str | None = None


class Cluster(Settings):
    """The Ray cluster to join; none given, that of RAY_ADDRESS, or a local one for this run.

    `address` is as ray.init takes it: `auto` joins the cluster that runs on this machine.

    `autoscaling` lets a run wait for nodes that do not exist yet, instead of refusing.
    """

    address: str | None = None
    autoscaling: bool = False
