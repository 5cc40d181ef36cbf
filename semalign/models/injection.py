"""Adapters that start from given low-rank factors.

An adapted matrix computes W x + B A x - B0 A0 x, where (B0, A0) are the given factors and (B, A),
which start equal to them, are trained: it starts as W, and W does not change. The factors of a
matrix n x m are B (n, r) and A (r, m); of an embedding, whose weight is V x D, they are those of
the transpose: B (D, r) and A (r, V).
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from semalign.core.pairing import paper_number
from semalign.errors import UserError, nearest
from semalign.models.decoder import find_decoder
from semalign.models.loading import save_model
from semalign.models.shapes import skeleton

if TYPE_CHECKING:  # see models/adapters.py
    from peft import LoraConfig, PeftModel

FactorPair = tuple[Tensor, Tensor]  # (B, A)
Site = tuple[int | None, str]

VOCABULARY = ("embed_tokens", "lm_head")
_TRAINED, _ORIGIN = "default", "origin"


class LowRankFactors(Protocol):
    """Factors (B, A) by module path, and the blocks they approximate (as weights) where kept."""

    @property
    def pairs(self) -> Mapping[str, FactorPair]: ...

    @property
    def blocks(self) -> Mapping[str, Tensor]: ...


def find_modules(
    model: nn.Module,
    names: Iterable[str],
    *,
    layers: int | None = None,
    setting: str = "seeking.modules",
) -> dict[Site, str]:
    """The linear modules of these names, as {(layer, name in the layer): path in the model}.

    **Arguments**: `layers` is the number of decoder layers to search, from the first (default:
    all); `setting` is named in errors. The layer of `embed_tokens` and of `lm_head` is None.

    **Raises** `UserError` if one of the layers has no module of a name.
    """
    decoder = find_decoder(model)
    paths = {module: path for path, module in model.named_modules()}
    outside = dict(zip(VOCABULARY, (decoder.embed, decoder.lm_head), strict=True))
    names = list(names)
    found: dict[Site, str] = {
        (None, name): paths[outside[name]] for name in names if name in outside
    }
    for index, layer in enumerate(decoder.layers[:layers]):
        linear = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        leaves = {n.split(".")[-1] for n in linear}
        for name in names:
            if name not in outside and name not in leaves:
                raise UserError(
                    f"{setting}: layer {paper_number(index)} (counted from 1) of "
                    f"{type(model).__name__} has no linear module '{name}'; "
                    f"{nearest(name, sorted(leaves | outside.keys()))}"
                )
        found |= {(index, n): paths[m] for n, m in linear.items() if n.split(".")[-1] in names}
    return found


def count_trainable(
    config: Any,
    modules: Iterable[str],
    rank: int,
    *,
    layers: int | None = None,
    trust_remote_code: bool = False,
) -> int:
    """The number of trained parameters: the sum of r (n + m), r at most min(n, m), from shapes.

    41,132,032 for all nine modules of Llama-2-7B at rank 16; 23,855,104 for up, down, v and o.
    """
    model = skeleton(config, trust_remote_code=trust_remote_code)
    shapes = [
        model.get_submodule(path).weight.shape  # type: ignore[union-attr]
        for path in find_modules(model, modules, layers=layers).values()
    ]
    return sum(min(rank, n, m) * (n + m) for n, m in shapes)


def inject(
    model: nn.Module, factors: LowRankFactors, *, dropout: float = 0.0, subtract: str = "low_rank"
) -> PeftModel:
    """The model, frozen, with a LoRA that starts from `factors`; dropout is on the trained branch.

    `subtract="low_rank"` (the authors' code) adds a second, frozen adapter (-B0, A0), so that the
    model starts as itself. This is exact up to rounding, with tied embeddings too, where the
    authors' W - B0 A0 + BA would change both uses of the one weight. `subtract="block"` (SemAlign's
    appendix B.1) subtracts from W, in its dtype, the block that the factors come from: the model
    starts as another one, and tied embeddings that change are untied.

    Trained and frozen factors are float32. Cost: two branches of rank r a module, 4 r (n + m)
    operations a token. As in PEFT, an embedding's branch has no dropout.

    **Raises** `UserError` if the factors do not fit the model's modules and shapes, or hold no
    blocks that `subtract="block"` needs.
    """
    from peft import get_peft_model

    _check_fit(model, factors, subtract)
    model.requires_grad_(False)
    if subtract == "block":
        _subtract_blocks(model, factors.blocks)
    ranks = {path: a.shape[0] for path, (_, a) in factors.pairs.items()}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=r"[\s\S]*tie_word_embeddings")  # never merged
        adapted = get_peft_model(model, _lora_config(ranks, dropout))
        _fill(adapted, _TRAINED, factors.pairs, sign=1)
        if subtract == "low_rank":
            adapted.add_adapter(_ORIGIN, _lora_config(ranks, 0.0))
            _fill(adapted, _ORIGIN, factors.pairs, sign=-1)
            adapted.base_model.set_adapter([_TRAINED, _ORIGIN])
    for module in _adapted_modules(adapted).values():
        if subtract == "low_rank":
            for factor in _factors(module, _ORIGIN):
                factor.requires_grad_(False)
    return adapted


def _check_fit(model: nn.Module, factors: LowRankFactors, subtract: str) -> None:
    if subtract not in ("low_rank", "block"):
        choice = nearest(subtract, ("low_rank", "block"))
        raise UserError(f"seeking.subtract={subtract!r}: {choice}")
    if subtract == "block" and (missing := sorted(factors.pairs.keys() - factors.blocks.keys())):
        raise UserError(
            f"seeking.subtract=block: the factors hold no block of {missing[0]}; "
            "expected factors that were made with it"
        )
    modules = dict(model.named_modules())
    for path, (b, a) in factors.pairs.items():
        if path not in modules:
            raise UserError(f"factors: the student has no {path}; {nearest(path, modules)}")
        weight = modules[path].weight
        shape = weight.T.shape if isinstance(modules[path], nn.Embedding) else weight.shape
        if (b.shape[0], a.shape[1]) != tuple(shape):
            raise UserError(
                f"factors: those of {path} are for {b.shape[0]} x {a.shape[1]}, "
                f"the student's is {shape[0]} x {shape[1]}"
            )


@torch.no_grad()
def _subtract_blocks(model: nn.Module, blocks: Mapping[str, Tensor]) -> None:
    decoder = find_decoder(model)
    vocabulary = any(path.split(".")[-1] in VOCABULARY for path in blocks)
    if vocabulary and decoder.lm_head.weight is decoder.embed.weight:
        weight = decoder.lm_head.weight.detach().clone()
        decoder.lm_head.weight = nn.Parameter(weight, requires_grad=False)
        model.config.tie_word_embeddings = False
    for path, block in blocks.items():
        weight = model.get_submodule(path).weight
        weight.copy_(weight.float() - block.to(weight.device).float())


def _lora_config(ranks: Mapping[str, int], dropout: float) -> LoraConfig:
    """A configuration of scale 1; matrices too small for the common rank have their own entry."""
    from peft import LoraConfig

    rank = max(ranks.values())
    clipped = {path: own for path, own in ranks.items() if own != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=clipped,
        alpha_pattern=dict(clipped),
        lora_dropout=dropout,
        target_modules=sorted(ranks),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _adapted_modules(model: PeftModel) -> dict[str, Any]:
    """LoRA modules by their path in the base model."""
    from peft.tuners.lora import LoraLayer

    named = model.get_base_model().named_modules()
    return {path: module for path, module in named if isinstance(module, LoraLayer)}


def _factors(module: Any, adapter: str) -> FactorPair:
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_B[adapter], module.lora_embedding_A[adapter]
    return module.lora_B[adapter].weight, module.lora_A[adapter].weight


@torch.no_grad()
def _fill(model: PeftModel, adapter: str, pairs: Mapping[str, FactorPair], *, sign: int) -> None:
    modules = _adapted_modules(model)
    for path, (b, a) in pairs.items():
        own_b, own_a = _factors(modules[path], adapter)
        own_b.copy_(sign * b)
        own_a.copy_(a)


def exports_adapter(model: PeftModel) -> bool:
    """Whether the model is its base and one LoRA, as vLLM serves it.

    If so, `save_injected` saves it; otherwise `save_merged` does.
    """
    leaves = {path.split(".")[-1] for path in _adapted_modules(model)}
    return _ORIGIN in model.peft_config and leaves.isdisjoint(VOCABULARY)


@torch.no_grad()
def save_injected(model: PeftModel, path: str | Path, base_path: str | Path) -> None:
    """Save BA - B0 A0 as one PEFT adapter of rank 2r in the folder `path`: [B, -B0] and [A; A0].

    Plain peft and vLLM load it; the bytes depend only on the weights and the settings.

    **Raises** `UserError` if one adapter does not hold the model (see `exports_adapter`).
    """
    if not exports_adapter(model):
        raise UserError(
            "seeking: embeddings, an LM head or a subtracted block do not go into an adapter; "
            "expected modules of the layers and subtract=low_rank, or a merged checkpoint"
        )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors, ranks = {}, {}
    for name, module in _adapted_modules(model).items():
        (b, a), (minus_b0, a0) = _factors(module, _TRAINED), _factors(module, _ORIGIN)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.cat([b, minus_b0], dim=1).cpu()
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat([a, a0]).cpu()
        ranks[name] = 2 * a.shape[0]
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _lora_config(ranks, model.peft_config[_TRAINED].lora_dropout)
    config.base_model_name_or_path, config.inference_mode = str(base_path), True
    config.save_pretrained(str(path))
    file = path / "adapter_config.json"
    saved = json.loads(file.read_text())
    saved["target_modules"] = sorted(saved["target_modules"])  # PEFT keeps a set: any order
    file.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def save_merged(model: PeftModel, path: str | Path, base_path: str | Path) -> None:
    """Save the injected model as an ordinary float32 checkpoint, with the base's tokenizer.

    Its weights are W + (BA - B0 A0), of those in memory: before training, W to the bit. Tied
    embeddings of which one is adapted are saved untied. Memory: one float32 copy of the model on
    the CPU.
    """
    base: Any = model.get_base_model()
    modules = _adapted_modules(model)
    state = {
        name.replace(".base_layer.", "."): tensor.to("cpu", torch.float32)
        for name, tensor in base.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in modules.items():
        delta = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
        state[f"{name}.weight"] = state[f"{name}.weight"] + delta.to("cpu", torch.float32)
    config = copy.deepcopy(base.config)
    if any(name.split(".")[-1] in VOCABULARY for name in modules):
        config.tie_word_embeddings = False
    with torch.device("meta"):
        whole = type(base)(config)
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    save_model(whole, path, base_path)
