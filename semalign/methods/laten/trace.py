"""What LaTen looks at in a model: one forward pass of an example, at its last useful token.

A neuron is a column of `down_proj` (FFN) or of `o_proj` (attention); its coefficient is what the
model multiplies that column by. Layers and neurons are 0-based. L layers, N neurons of a layer,
D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from semalign.core.pairing import paper_number
from semalign.errors import UserError
from semalign.methods.checks import check_model
from semalign.models.decoder import Decoder, run_base, sublayer

Kind = Literal["ffn", "attn"]
NEURON_KINDS: tuple[Kind, ...] = ("ffn", "attn")
PROJECTIONS = {"up_proj": "mlp", "down_proj": "mlp", "v_proj": "self_attn", "o_proj": "self_attn"}
_OUTPUT: dict[Kind, str] = {"ffn": "down_proj", "attn": "o_proj"}
_SAYS_NOTHING = '." )\n,]'


class LatenRow(Protocol):
    """A supervised example in the student's ids, such as `semalign.data.tokens.Tokens`."""

    @property
    def id(self) -> str: ...
    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def prompt_length(self) -> int: ...


@dataclass(frozen=True)
class Query:
    """An example cut before its last useful token: the model reads `ids`, `target` comes next."""

    id: str
    ids: tuple[int, ...]
    target: int


def last_useful(row: LatenRow, decode: Callable[[int], str]) -> Query:
    """The example up to its last answer token that is more than `. " ) , ]`, space and newline.

    `decode` gives the text of one id, "" for special tokens such as EOS. Tokens are dropped, not
    characters: text cut and tokenised anew could split elsewhere, while these ids mean the same to
    both models, position by position. A token like `}.` stays whole.

    Raises UserError when the answer has no such token.
    """
    for end in range(len(row.ids) - 1, row.prompt_length - 1, -1):
        if decode(row.ids[end]).strip(_SAYS_NOTHING):
            return Query(row.id, tuple(row.ids[:end]), row.ids[end])
    raise UserError(
        f"example {row.id}: its answer has nothing but punctuation and spaces; expected a token "
        "that LaTen can attribute to neurons"
    )


def in_teacher_ids(query: Query, student_to_teacher: Sequence[int]) -> Query:
    """The same tokens in the teacher's ids; the table is -1 where the teacher has no such token.

    Raises UserError naming the example and the first such token.
    """
    *ids, target = found = [student_to_teacher[i] for i in (*query.ids, query.target)]
    if -1 in found:
        missing = (*query.ids, query.target)[found.index(-1)]
        what = "its last useful token" if -1 not in ids else "a token"
        raise UserError(
            f"example {query.id}: {what}, student id {missing}, is not in the teacher's "
            "vocabulary; LaTen locates neurons by tokens that both models have"
        )
    return replace(query, ids=tuple(ids), target=target)


@dataclass(frozen=True)
class Trace:
    """What a model did at position T of one query, in float32 (float64 of a float64 model).

    inputs, attn, ffn: (L, D), a layer's input and what its sublayers add to it. coefficients: of
    each kind (L, N), what the columns of its output projection are multiplied by; of attention only
    the part that comes from position T itself, a_{h,T,T} V_{T,h,d}, as the authors have it.
    last, normed: (D,), before and after the final norm.
    """

    target: int
    inputs: Tensor
    attn: Tensor
    ffn: Tensor
    coefficients: dict[Kind, Tensor]
    last: Tensor
    normed: Tensor

    def base(self, kind: Kind) -> Tensor:
        """(L, D): the residual stream that the sublayer is added to."""
        return self.inputs if kind == "attn" else self.inputs + self.attn


@torch.no_grad()
def trace(decoder: Decoder, query: Query) -> Trace:
    """One forward pass; only position T of what is looked at is kept. No hook survives."""
    seen: dict[tuple[int, str], Tensor] = {}
    device = decoder.lm_head.weight.device

    def watch(hooks: ExitStack, module: nn.Module, key: tuple[int, str], look: Any) -> None:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[key] = wide(look(args, kwargs, output)).to(device)

        handle = module.register_forward_hook(hook, with_kwargs=True)
        hooks.callback(handle.remove)

    with ExitStack() as hooks, _eager_attention(decoder.model):
        for index, layer in enumerate(decoder.layers):
            watch(hooks, layer, (index, "input"), lambda a, k, _: _hidden(a, k)[0, -1])
            watch(hooks, layer.self_attn, (index, "weight"), lambda _a, _k, o: o[1][0, :, -1, -1])
            watch(hooks, layer.self_attn.v_proj, (index, "value"), lambda _a, _k, o: o[0, -1])
            watch(hooks, layer.self_attn.o_proj, (index, "attn"), lambda _a, _k, o: o[0, -1])
            watch(hooks, layer.mlp.down_proj, (index, "gated"), lambda a, _k, _: a[0][0, -1])
            watch(hooks, layer.mlp.down_proj, (index, "ffn"), lambda _a, _k, o: o[0, -1])
        watch(hooks, decoder.norm, (-1, "last"), lambda a, k, _: _hidden(a, k)[0, -1])
        watch(hooks, decoder.norm, (-1, "normed"), lambda _a, _k, o: o[0, -1])
        ids = torch.tensor([query.ids])
        run_base(decoder, ids, torch.ones_like(ids))

    def stacked(name: str) -> Tensor:
        return torch.stack([seen[index, name] for index in range(len(decoder.layers))])

    from_self = stacked("weight").repeat_interleave(width_per_head(decoder), dim=1)
    values = stacked("value")[:, value_rows(decoder, torch.arange(from_self.shape[1]))]
    return Trace(
        target=query.target,
        inputs=stacked("input"),
        attn=stacked("attn"),
        ffn=stacked("ffn"),
        coefficients={"attn": from_self * values, "ffn": stacked("gated")},
        last=seen[-1, "last"],
        normed=seen[-1, "normed"],
    )


def _hidden(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Within the context attention is computed the way that gives its weights. Theirs are right
    for every family (grouped heads, rotary embeddings, norms of q and k); ours would repeat them.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def projection(decoder: Decoder, layer: int, name: str) -> nn.Linear:
    """One of the four `PROJECTIONS` of a layer."""
    return getattr(getattr(decoder.layers[layer], PROJECTIONS[name]), name)


def output_weight(decoder: Decoder, layer: int, kind: Kind) -> Tensor:
    """(D, N): the neurons' vectors are its columns."""
    return projection(decoder, layer, _OUTPUT[kind]).weight


def width_per_head(decoder: Decoder) -> int:
    return output_weight(decoder, 0, "attn").shape[1] // decoder.base.config.num_attention_heads


def value_rows(decoder: Decoder, neurons: Tensor) -> Tensor:
    """The row of v_proj behind each column of o_proj: several query heads share one value head.

    Column n is entry n % hd of query head n // hd, whose value head is n // hd // n_rep.
    """
    hd = width_per_head(decoder)
    repeats = output_weight(decoder, 0, "attn").shape[1] // len(
        projection(decoder, 0, "v_proj").weight
    )
    return neurons // hd // repeats * hd + neurons % hd


def check_form(decoder: Decoder, who: str) -> None:
    """Raise UserError for a model whose sublayers are not sums of columns of down_proj and o_proj.

    Those are: up, down, v and o projections missing (fused, or experts), a norm behind a sublayer,
    a softcap on the logits, and what `check_model` refuses.
    """
    name = f"the {who} ({type(decoder.base).__name__})"
    for index, layer in enumerate(decoder.layers):
        for leaf, parent in PROJECTIONS.items():
            if not isinstance(getattr(getattr(layer, parent), leaf, None), nn.Linear):
                raise UserError(
                    f"{name}: layer {paper_number(index)} (counted from 1) has no {parent}.{leaf}; "
                    f"LaTen needs {', '.join(PROJECTIONS)} as linear modules"
                )
        if sublayer(layer, "mlp") is not layer.mlp:
            raise UserError(
                f"{name} has a norm behind its sublayers; LaTen needs sublayers that are sums of "
                "their neurons, as in Llama, Mistral, Qwen2, Qwen3 and Gemma"
            )
    if decoder.softcap is not None:
        raise UserError(f"{name} caps its logits; LaTen reads neurons through a plain LM head")
    check_model(decoder)
