"""LaTen to the letter: one neuron, one token of the vocabulary, one key at a time; dense deltas."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scores = dict[str, list[list[float]]]


def log_p(model: nn.Module, h: Tensor, s: float, w: int, gain: Tensor) -> float:
    """log softmax(lm_head(g * h * s))[w]."""
    read = (gain * h * s).double()
    z = [float(row @ read) for row in model.lm_head.weight.double()]
    return z[w] - math.log(sum(math.exp(v) for v in z))


class Observed:
    """All that is needed of one example, from the model's modules alone and without hooks."""

    def __init__(self, model: nn.Module, ids: list[int], gain: Tensor) -> None:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            said = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        model.set_attn_implementation("sdpa")
        config = model.config
        heads = config.num_attention_heads
        repeats = heads // config.num_key_value_heads
        self.model, self.gain, self.logits = model, gain, said.logits[0, -1]
        self.inputs, self.attn, self.ffn = [], [], []
        self.attn_coefficients: list[Tensor] = []  # of every neuron from the last key alone
        self.all_keys: list[Tensor] = []  # of every neuron from all keys
        self.ffn_coefficients: list[Tensor] = []
        for index, layer in enumerate(model.model.layers):
            x = said.hidden_states[index][0]
            values = layer.self_attn.v_proj(layer.input_layernorm(x))
            weights = said.attentions[index][0]  # (heads, T, T)
            hd = layer.self_attn.o_proj.in_features // heads
            own, every = [], []
            for head in range(heads):
                for d in range(hd):
                    column = values[:, head // repeats * hd + d]
                    own.append(weights[head, -1, -1] * column[-1])
                    every.append(sum(weights[head, -1, j] * column[j] for j in range(len(ids))))
            self.attn_coefficients.append(torch.stack(own))
            self.all_keys.append(torch.stack(every))
            attn = layer.self_attn.o_proj(self.all_keys[-1])
            middle = layer.post_attention_layernorm((x[-1] + attn)[None])[0]
            mlp = layer.mlp
            gated = mlp.act_fn(mlp.gate_proj(middle)) * mlp.up_proj(middle)
            self.ffn_coefficients.append(gated)
            self.inputs.append(x[-1])
            self.attn.append(attn)
            self.ffn.append(mlp.down_proj(gated))
        self.last = self.inputs[-1] + self.attn[-1] + self.ffn[-1]

    def scale(self, readout: str, eps: float) -> float:
        values = self.last.double().tolist()
        mean = sum(values) / len(values)
        if readout == "correct":
            return 1 / math.sqrt(sum(v * v for v in values) / len(values) + eps)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        return 1 / math.sqrt(math.sqrt(variance + 1e-5) + 1e-6)

    def layer_scores(self, s: float, w: int) -> dict[str, list[float]]:
        scores: dict[str, list[float]] = {"attn": [], "ffn": []}
        for h, attn, ffn in zip(self.inputs, self.attn, self.ffn, strict=True):
            steps = [log_p(self.model, x, s, w, self.gain) for x in (h, h + attn, h + attn + ffn)]
            scores["attn"].append(steps[1] - steps[0])
            scores["ffn"].append(steps[2] - steps[1])
        return scores

    def neuron_scores(self, s: float, w: int) -> Scores:
        scores: Scores = {"attn": [], "ffn": []}
        for index, layer in enumerate(self.model.model.layers):
            h = self.inputs[index]
            parts = [
                ("attn", h, self.attn_coefficients[index], layer.self_attn.o_proj.weight),
                (
                    "ffn",
                    h + self.attn[index],
                    self.ffn_coefficients[index],
                    layer.mlp.down_proj.weight,
                ),
            ]
            for kind, base, coefficients, weight in parts:
                before = log_p(self.model, base, s, w, self.gain)
                scores[kind].append(
                    [
                        log_p(self.model, base + c * weight[:, n], s, w, self.gain) - before
                        for n, c in enumerate(coefficients)
                    ]
                )
        return scores


def best_neurons(scores: list[float], n: int) -> list[int]:
    """The n best after rounding to 4 decimals; Python's sort keeps the order of equals."""
    return sorted(range(len(scores)), key=lambda i: -round(scores[i], 4))[:n]


def best_layers(scores: list[float], n: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: scores[i])[::-1][:n])


def dense_deltas(
    net: nn.ModuleDict,
    teacher: nn.Module,
    student: nn.Module,
    teacher_neurons: Any,
    student_neurons: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    """{weight name of the student: a whole matrix of what is added}, neuron by neuron; and the sum
    over module names of the mean of squares of the translated vectors.
    """
    added: dict[str, Tensor] = {}
    penalty = torch.zeros(())
    for name, parent in (
        ("up_proj", "mlp"),
        ("down_proj", "mlp"),
        ("v_proj", "self_attn"),
        ("o_proj", "self_attn"),
    ):
        kind = "ffn" if parent == "mlp" else "attn"
        squares = []
        for rank, (theirs, ours) in enumerate(
            zip(teacher_neurons[kind].layers, student_neurons[kind].layers, strict=True)
        ):
            source = getattr(getattr(teacher.model.layers[theirs], parent), name).weight
            key = f"model.layers.{ours}.{parent}.{name}.weight"
            rows = []  # of the matrix, or of its transpose
            for a, b in zip(
                teacher_neurons[kind].chosen[rank].tolist(),
                student_neurons[kind].chosen[rank].tolist(),
                strict=True,
            ):
                if name == "v_proj":
                    a, b = _value_row(teacher.config, a), _value_row(student.config, b)
                vector = source[a] if name in ("up_proj", "v_proj") else source[:, a]
                hidden = (net[name].first @ vector.detach()).clamp(min=0)
                rows.append((b, net[name].second @ hidden))
                squares.append(rows[-1][1].square())
            target = dict(student.named_parameters())[key]
            whole = torch.zeros_like(target)
            for b, value in rows:
                unit = torch.zeros(whole.shape[0 if name in ("up_proj", "v_proj") else 1])
                unit[b] = 1
                by_row = name in ("up_proj", "v_proj")
                whole = whole + (torch.outer(unit, value) if by_row else torch.outer(value, unit))
            added[key] = whole
        penalty = penalty + torch.cat(squares).mean()
    return added, penalty


def _value_row(config: Any, n: int) -> int:
    hd = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return n // hd // (config.num_attention_heads // config.num_key_value_heads) * hd + n % hd


def train(
    net: nn.ModuleDict,
    teacher: nn.Module,
    student: nn.Module,
    located: list[tuple[Any, Any]],
    pools: list[list[Any]],
    *,
    cycle: int,
    lr: float,
    weight_decay: float,
    weight: float,
) -> list[float]:
    """One AdamW step a pool, through whole matrices and torch's OneCycleLR; mean losses."""
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=cycle, pct_start=0.1, final_div_factor=1
    )
    losses = []
    for (teacher_neurons, student_neurons), pool in zip(located, pools, strict=True):
        optimizer.zero_grad()
        total = 0.0
        for row in pool:
            added, penalty = dense_deltas(net, teacher, student, teacher_neurons, student_neurons)
            weights = {
                key: parameter.detach() + added.get(key, 0)
                for key, parameter in student.named_parameters()
            }
            loss = answer_loss(student, weights, row) + weight * penalty
            loss.backward()
            total += loss.item()
        optimizer.step()
        schedule.step()
        losses.append(total / len(pool))
    return losses


def answer_loss(student: nn.Module, weights: dict[str, Tensor], row: Any) -> Tensor:
    ids = torch.tensor([row.ids])
    scores = torch.func.functional_call(student, weights, (ids,)).logits[0]
    terms = [
        -F.log_softmax(scores[t - 1].float(), dim=-1)[row.ids[t]]
        for t in range(row.prompt_length, len(row.ids))
    ]
    return torch.stack(terms).mean()
