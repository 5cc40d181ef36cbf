from __future__ import annotations

from pathlib import Path

import pytest
import torch

from semalign.models.decoder import capture, find_decoder, run_base
from semalign.models.loading import load_model
from semalign.models.partial import stopping_after
from tests.models.architectures import (
    FAMILIES,
    count_hooks,
    right_padded_batch,
    save_checkpoint,
    shared_model,
)

IDS, MASK = right_padded_batch()
PARTS = ("input", "attn", "mlp", "block")


@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_early_equals_a_truncated_model(family: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, family)
    whole = find_decoder(load_model(folder))
    for layer in range(3):
        truncated = find_decoder(load_model(folder, num_layers=layer + 1))
        wanted = [(index, part) for index in range(layer + 1) for part in PARTS]
        with torch.no_grad():
            with capture(truncated, wanted) as expected:
                last = run_base(truncated, IDS, MASK)
            with stopping_after(whole, layer), capture(whole, wanted) as found:
                assert torch.equal(run_base(whole, IDS, MASK), last)
        assert found.keys() == expected.keys() == set(wanted)
        for key in wanted:
            assert torch.equal(found[key], expected[key]), key


def test_stopping_early_runs_no_deeper_layer() -> None:
    decoder = find_decoder(shared_model("gemma2"))
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_args, index=index: ran.append(index))
        for index, layer in enumerate(decoder.layers)
    ]
    with stopping_after(decoder, 1):
        run_base(decoder, IDS, MASK)
    assert ran == [0, 1]
    run_base(decoder, IDS, MASK)
    assert ran == [0, 1, 0, 1, 2]
    for handle in handles:
        handle.remove()


def test_the_whole_model_is_put_back_after_an_exception() -> None:
    decoder = find_decoder(shared_model("qwen2"))
    layers, hooks = list(decoder.layers), count_hooks(decoder.model)
    before = run_base(decoder, IDS, MASK)
    with pytest.raises(ZeroDivisionError), stopping_after(decoder, 0):
        assert list(decoder.layers) != layers
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(layers, decoder.layers, strict=True))
    assert count_hooks(decoder.model) == hooks
    assert torch.equal(run_base(decoder, IDS, MASK), before)
