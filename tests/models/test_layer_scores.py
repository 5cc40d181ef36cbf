"""Attribution on real decoders: every family, every granularity, right-padded batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from semalign.core.attribution import layer_scores
from semalign.models.decoder import INTERFACES, find_decoder, logits, sublayer
from tests.models.architectures import FAMILIES, count_hooks, right_padded_batch, shared_model
from tests.reference import attribution as reference

IDS, MASK = right_padded_batch()


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_one_layer_at_a_time(family: str, interface: str) -> None:
    decoder = find_decoder(shared_model(family))
    before = count_hooks(decoder.model)
    supervised = MASK[:, 1:].bool()

    def loss(embeds: Tensor) -> Tensor:
        hidden = decoder.base(inputs_embeds=embeds, attention_mask=MASK).last_hidden_state
        rows = logits(decoder, hidden[:, :-1][supervised])
        return torch.nn.functional.cross_entropy(rows, IDS[:, 1:][supervised], reduction="sum")

    layers = [sublayer(layer, interface) for layer in decoder.layers]
    embeds = decoder.embed(IDS)
    found = layer_scores(loss, layers, embeds, aggregation="abs_sum")
    expected = [reference.layer_score(loss, layer, embeds, "abs_sum") for layer in layers]
    assert found == pytest.approx(expected, rel=1e-4)
    assert min(found) > 0 and count_hooks(decoder.model) == before


def test_padding_has_no_part_in_the_scores() -> None:
    decoder = find_decoder(shared_model("llama"))

    def scores(ids: Tensor, mask: Tensor) -> list[float]:
        def loss(embeds: Tensor) -> Tensor:
            hidden = decoder.base(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
            return logits(decoder, hidden[:, :4]).logsumexp(-1).sum()

        return layer_scores(loss, list(decoder.layers), decoder.embed(ids))

    padded, alone = scores(IDS[1:2], MASK[1:2]), scores(IDS[1:2, :5], MASK[1:2, :5])
    assert padded == pytest.approx(alone, rel=1e-4)
