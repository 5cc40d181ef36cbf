"""Scores of the whole stage against plain autograd, example by example."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from semalign.data.tokens import Tokens
from semalign.models.decoder import find_decoder, sublayer
from semalign.models.loading import load_model
from semalign.stages.attribution import attribution_scores


@pytest.mark.parametrize("granularity", ["block", "attn", "mlp"])
@pytest.mark.parametrize("aggregation", ["abs_sum", "sum"])
def test_scores(
    family: dict[str, Path], tokens: list[Tokens], granularity: str, aggregation: str
) -> None:
    model = load_model(family["teacher"], dtype="float32")
    found = attribution_scores(
        model, tokens, granularity=granularity, aggregation=aggregation, batch_size=3
    )
    decoder = find_decoder(model.requires_grad_(True))
    expected = [0.0] * len(decoder.layers)
    for example in tokens:
        said: list[torch.Tensor] = []
        hooks = [
            sublayer(layer, granularity).register_forward_hook(
                lambda _m, _a, out, said=said: said.append(out)
            )
            for layer in decoder.layers
        ]
        logits = model(torch.tensor([example.ids])).logits[0]
        for hook in hooks:
            hook.remove()
        where = range(len(example.ids))[example.supervised_positions]
        losses = [-torch.log_softmax(logits[t], 0)[example.ids[t + 1]] for t in where]
        gradients = torch.autograd.grad(torch.stack(losses).mean(), said)
        for layer, (gradient, activation) in enumerate(zip(gradients, said, strict=True)):
            product = gradient * activation
            total = product.abs().sum() if aggregation == "abs_sum" else product.sum()
            expected[layer] += total.item()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
