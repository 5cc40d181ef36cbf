"""LaTen: neurons that predict an example's last useful token (Tan et al., 2025).

A neuron's score is what adding its vector (coefficient times column) alone does to log p(w), with

    p(. | h) = softmax(lm_head(g * h * s)), g the final norm's weight, one s for an example's h's.

Layers and neurons are 0-based. E examples, L layers, N neurons of a layer, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semalign.errors import UserError, nearest
from semalign.methods.laten.trace import (
    NEURON_KINDS,
    Kind,
    Query,
    Trace,
    check_form,
    output_weight,
    trace,
    wide,
)
from semalign.models.decoder import Decoder, find_decoder

READOUTS = ("correct", "as_coded")
PIECE = 2**22  # logits of one piece: 16 MiB in float32, with temporaries at most 64 MiB


@dataclass(frozen=True)
class Neurons:
    """The chosen layers, ascending, and (L, n), on the CPU, each one's neurons, best first."""

    layers: tuple[int, ...]
    chosen: Tensor


Located = dict[Kind, Neurons]


@torch.no_grad()
def locate(
    model: nn.Module,
    queries: Sequence[Query],
    *,
    num_layers: int,
    counts: dict[Kind, int],
    readout: str = "correct",
    who: str = "model",
) -> list[Located]:
    """For each query the `num_layers` layers that predict most, and their `counts` best neurons.

    `who` names the model in errors.

    Scores of neurons are rounded to 4 decimals as the authors do; of equals the first is better.
    Cost: a forward pass a query (eager attention), and 2 N V D operations a layer however many
    queries there are: the logits of a neuron's column are the same for all of them.

    Raises UserError for a model without the four projections, one whose layers or final norm are of
    another form, too few layers or neurons, an unknown readout, and scores that are not finite.
    """
    decoder = find_decoder(model)
    check_form(decoder, who)
    check_size(decoder, num_layers, counts, who)
    traces = [trace(decoder, query) for query in queries]
    lens = LogitLens.of(decoder)
    scales = torch.stack([lens.scale(seen, readout) for seen in traces])
    sublayers = [sublayer_scores(lens, *pair) for pair in zip(traces, scales, strict=True)]
    found: list[Located] = [{} for _ in queries]
    for kind in NEURON_KINDS:
        layers = [_best_layers(scores[kind], num_layers) for scores in sublayers]
        ranked: list[list[Tensor]] = [[] for _ in queries]
        for layer in range(len(decoder.layers)):
            users = [e for e, chosen in enumerate(layers) if layer in chosen]
            if users:
                scores = neuron_scores(
                    lens,
                    output_weight(decoder, layer, kind),
                    base=torch.stack([traces[e].base(kind)[layer] for e in users]),
                    coefficients=torch.stack([traces[e].coefficients[kind][layer] for e in users]),
                    scales=scales[users],
                    targets=[traces[e].target for e in users],
                )
                for e, row in zip(users, scores, strict=True):
                    ranked[e].append(best_neurons(row, counts[kind]))
        for e, chosen in enumerate(layers):
            found[e][kind] = Neurons(chosen, torch.stack(ranked[e]))
    return found


def _best_layers(scores: Tensor, n: int) -> tuple[int, ...]:
    """The n layers of the highest score, ascending; of equals the deeper, as the authors do."""
    order = sorted(range(len(scores)), key=lambda layer: (float(scores[layer]), layer))
    return tuple(sorted(order[-n:]))


def best_neurons(scores: Tensor, n: int) -> Tensor:
    """The n best of scores (N,) after rounding to 4 decimals, best first; of equals the first."""
    if not bool(scores.isfinite().all()):
        raise UserError("LaTen's neuron scores are not finite: try dtype float32 or bfloat16")
    rounded = (scores.double().cpu() * 1e4).round().long()
    return rounded.argsort(descending=True, stable=True)[:n]


@dataclass(frozen=True)
class LogitLens:
    """A model's logits of any hidden state, through its LM head and the final norm's scale at one
    position; in float32 (float64 of a float64 model).

    head: (V, D), what the LM head and the final norm's weight g make of h; bias: (V,) or None.
    """

    weight: Tensor
    head: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, decoder: Decoder) -> LogitLens:
        """Costs one more copy of the LM head in float32."""
        head = decoder.lm_head
        # the norm of equal numbers is its effective weight (Gemma's is 1 + the stored one), and of
        # 256s it is so exactly: their RMS hides the epsilon, and all is a power of 2
        flat = torch.full((head.weight.shape[1],), 256.0).to(next(decoder.norm.parameters()))
        weight = wide(decoder.norm(flat)).to(head.weight.device)
        bias = None if head.bias is None else wide(head.bias)
        return cls(weight, wide(head.weight) * weight, bias)

    def scale(self, seen: Trace, readout: str) -> Tensor:
        """s of an example, from its last hidden state h_L at T (a scalar).

        `correct`: 1 / RMS(h_L), what the final norm itself multiplied g * h_L by, so that h_L is
        read as the model reads it. `as_coded`, by the authors: 1 / sqrt(sigma + 1e-6) with sigma =
        sqrt(Var(h_L) + 1e-5), nearly the square root of what was meant.
        """
        plain = self.weight * seen.last
        scale = seen.normed.norm() / plain.norm()
        off = (plain * scale - seen.normed).abs().max()
        if not off <= 0.02 * seen.normed.abs().max():  # a NaN is no RMS norm either
            raise UserError("the model's final norm is no RMS norm; LaTen's readout needs one")
        if readout == "correct":
            return scale
        if readout == "as_coded":
            sigma = (seen.last.var(correction=0) + 1e-5).sqrt()
            return (sigma + 1e-6).rsqrt()
        raise UserError(f"laten.readout={readout}: {nearest(readout, READOUTS)}")

    def logits(self, hidden: Tensor, scales: Tensor) -> Tensor:
        """(.., V) of hidden (.., D), whose scales broadcast against (.., 1)."""
        return nn.functional.linear(hidden * scales, self.head, self.bias)


def log_p(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits (.., V)) at targets (..)."""
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    return chosen - logits.logsumexp(dim=-1)


def sublayer_scores(lens: LogitLens, seen: Trace, scale: Tensor) -> dict[Kind, Tensor]:
    """(L,) of each kind: what the sublayer as a whole does to log p(w)."""
    target = torch.full((len(seen.inputs),), seen.target, device=seen.inputs.device)
    between = seen.inputs + seen.attn
    before_attn, before_ffn, after = (
        log_p(lens.logits(hidden, scale), target)
        for hidden in (seen.inputs, between, between + seen.ffn)
    )
    return {"attn": before_ffn - before_attn, "ffn": after - before_ffn}


def neuron_scores(
    lens: LogitLens,
    columns: Tensor,
    *,
    base: Tensor,
    coefficients: Tensor,
    scales: Tensor,
    targets: Sequence[int],
) -> Tensor:
    """(E, N): log p(w | h + c_n column_n) - log p(w | h), for h = base (E, D).

    columns: (D, N); coefficients: (E, N); scales: (E,). The logits are those of h plus c_n s times
    the column's own, which are computed once for all examples, some columns at a time: of all N V
    logits 2^22, with temporaries four times that, are held. Cost: 2 N V D operations, then a few
    N V an example.
    """
    where = torch.tensor(targets, device=base.device)
    start = lens.logits(base, scales[:, None])
    before = log_p(start, where)
    scaled_coefficients = coefficients * scales[:, None]
    pieces = []
    for part in torch.arange(columns.shape[1]).split(max(1, PIECE // len(lens.head))):
        among = slice(int(part[0]), int(part[-1]) + 1)
        column_logits = wide(columns[:, among]).to(base).T @ lens.head.T
        rows = [
            log_p(
                torch.addcmul(start[e], scaled_coefficients[e, among, None], column_logits),
                where[e].expand(len(column_logits)),
            )
            for e in range(len(base))
        ]
        pieces.append(torch.stack(rows))
    return torch.cat(pieces, dim=1) - before[:, None]


def check_size(decoder: Decoder, num_layers: int, counts: dict[Kind, int], who: str) -> None:
    """Raise UserError for a model that has fewer layers or neurons; looks at shapes alone."""
    if not 1 <= num_layers <= len(decoder.layers):
        raise UserError(
            f"laten.layers: {num_layers} layers are to be located in both models, the {who} "
            f"has 1..{len(decoder.layers)}"
        )
    for kind, count in counts.items():
        available = output_weight(decoder, 0, kind).shape[1]
        if not 1 <= count <= available:
            raise UserError(
                f"laten.share: {count} {kind} neurons a layer are to be located in both models, "
                f"the {who} has 1..{available}"
            )
