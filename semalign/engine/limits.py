"""What vLLM would refuse once it has started, in one line before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from semalign.config.sections import Evaluation
from semalign.errors import UserError
from semalign.models.loading import check_plain, load_config
from semalign.models.peft_folder import LARGEST_RANK
from semalign.models.reference import Model
from semalign.stages.scoring import GenerationRequest

if TYPE_CHECKING:  # an engine's process needs no methods
    from semalign.methods.method import Transfer

TARGETS = "training.lora.target_modules"
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vLLM's attention on CPUs
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Projections that some checkpoints have as one matrix: vLLM expects adapters on their parts, but of
# models of these types.
MERGED, SERVED_MERGED = ("gate_up_proj", "qkv_proj"), ("phi3",)
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, LARGEST_RANK)  # what vLLM accepts


def check_engine(model: Model, settings: Evaluation) -> None:
    """Check that an engine by these settings can serve the model.

    Raises UserError for a head size that vLLM does not have on CPUs, a number of heads that its
    ranks cannot share, and quantised weights.
    """
    size = head_size(model.config)
    if settings.num_gpus == 0 and size not in CPU_HEADS:
        raise UserError(
            f"model '{model.path}': its attention heads have size {size}, and vLLM on CPUs serves "
            f"{', '.join(map(str, CPU_HEADS))} alone; expected evaluation.num_gpus=1 or another "
            "model"
        )
    heads, parts = int(model.config.num_attention_heads), settings.tensor_parallel_size
    if heads % parts:
        raise UserError(
            f"tensor_parallel_size={parts}: expected a divisor of the {heads} attention heads of "
            f"'{model.path}'"
        )
    if not model.absent:
        check_plain(model.path, load_config(model.path, trust_remote_code=model.trust_remote_code))


def check_engines(transfers: Iterable[Transfer]) -> None:
    """`check_engine` of both models of every transfer, each once, and `check_targets`."""
    from semalign.methods.method import used_settings

    checked: set[tuple[object, ...]] = set()
    for transfer in transfers:
        config, student = transfer.config, transfer.inputs.student
        settings, training = config.evaluation, config.training
        given = student.path, config.method, training.lora.target_modules, settings.num_gpus
        if training.adapter == "lora" and given not in checked:
            check_targets(student, used_settings(config).get(TARGETS, ()), settings, TARGETS)
            checked.add(given)
        for model in (transfer.inputs.student, transfer.inputs.teacher):
            key = model.path, settings.model_dump_json()
            if key not in checked:
                check_engine(model, settings)
            checked.add(key)


def check_targets(model: Model, targets: Iterable[str], settings: Evaluation, what: str) -> None:
    """Raise UserError, which names `what`, where vLLM serves no adapter on these modules: merged
    projections, and on CPUs any module of a model with experts.
    """
    kind, targets = model.config.model_type, tuple(targets)
    experts = any((getattr(model.config, name, None) or 0) > 1 for name in EXPERTS)
    if targets and experts and settings.num_gpus == 0:
        raise UserError(
            f"{what}: vLLM on CPUs serves no adapter of a model with experts ('{model.path}'); "
            "expected evaluation.num_gpus=1, or a merged model (training.adapter=full)"
        )
    merged = {name.rpartition(".")[2] for name in targets} & set(MERGED)
    if merged and kind not in SERVED_MERGED:
        raise UserError(
            f"{what}: vLLM serves no adapter on {', '.join(sorted(merged))} of {kind} models "
            f"('{model.path}'), which hold it as one matrix; expected other modules"
        )


def head_size(config: Any) -> int:
    """Of one attention head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def check_context(requests: Sequence[GenerationRequest], what: str, length: int) -> None:
    """Raise UserError where not one prompt fits into `length` tokens with its answer."""
    if requests and all(request.truncated for request in requests):
        raise UserError(
            f"max_model_len: with {length} tokens of prompt and answer not one of the "
            f"{len(requests)} prompts of {what} is whole; expected more (the model's own limit is "
            "max_position_embeddings)"
        )
