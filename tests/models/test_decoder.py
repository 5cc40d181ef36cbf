from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from semalign.errors import UserError
from semalign.models.decoder import (
    Decoder,
    capture,
    find_decoder,
    logits,
    run_base,
    sublayer,
    verify_structure,
)
from semalign.models.partial import PassThrough, drop_prefix, run_from
from tests.models.architectures import (
    FAMILIES,
    count_hooks,
    make_config,
    make_model,
    right_padded_batch,
    shared_model,
)

IDS, MASK = right_padded_batch()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def decoder(family: str) -> Decoder:
    return find_decoder(shared_model(family))


def real_positions(x: Tensor) -> Tensor:
    return x[MASK.bool()]


@torch.no_grad()
def capture_all(decoder: Decoder, parts: tuple[str, ...]) -> dict[tuple[int, str], Tensor]:
    wanted = [(layer, part) for layer in range(len(decoder.layers)) for part in parts]
    with capture(decoder, wanted) as captured:
        run_base(decoder, IDS, MASK)
    return captured


def test_structure_is_verified_and_leaves_no_hook(decoder: Decoder) -> None:
    before = count_hooks(decoder.model)
    verify_structure(decoder)
    assert count_hooks(decoder.model) == before


def test_structure_is_verified_in_bfloat16(family: str) -> None:
    verify_structure(find_decoder(make_model(family).to(torch.bfloat16)))


def test_sublayers_add_up_to_the_block_on_a_padded_batch(decoder: Decoder) -> None:
    captured = capture_all(decoder, ("input", "attn", "mlp", "block"))
    for layer in range(len(decoder.layers)):
        block_in, attn, mlp, block_out = (
            captured[layer, part] for part in ("input", "attn", "mlp", "block")
        )
        assert attn.abs().max() > 1e-2 and mlp.abs().max() > 1e-2
        torch.testing.assert_close(block_in + attn + mlp, block_out)


def test_captured_blocks_are_transformers_hidden_states(decoder: Decoder) -> None:
    captured = capture_all(decoder, ("input", "block"))
    with torch.no_grad():
        states = decoder.base(
            input_ids=IDS, attention_mask=MASK, output_hidden_states=True
        ).hidden_states
    last = len(decoder.layers) - 1
    for layer in range(last + 1):
        torch.testing.assert_close(captured[layer, "input"], states[layer])
        if layer < last:  # transformers gives the last one after the final norm
            torch.testing.assert_close(captured[layer, "block"], states[layer + 1])
    with torch.no_grad():
        torch.testing.assert_close(decoder.norm(captured[last, "block"]), states[-1])


def test_captured_mlp_is_the_sublayer_recomputed_by_hand() -> None:
    decoder = find_decoder(shared_model("llama"))
    captured = capture_all(decoder, ("input", "attn", "mlp"))
    layer = decoder.layers[1]
    x = captured[1, "input"] + captured[1, "attn"]
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + decoder.base.config.rms_norm_eps)
    x = x * layer.post_attention_layernorm.weight
    gate = x @ layer.mlp.gate_proj.weight.T
    x = gate * torch.sigmoid(gate) * (x @ layer.mlp.up_proj.weight.T)
    torch.testing.assert_close(captured[1, "mlp"], x @ layer.mlp.down_proj.weight.T)


def test_logits_are_the_models(decoder: Decoder) -> None:
    with torch.no_grad():
        ours = logits(decoder, run_base(decoder, IDS, MASK)[MASK.bool()])
        theirs = decoder.model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(ours, real_positions(theirs))


def test_no_layer_sees_padding(decoder: Decoder) -> None:
    with torch.no_grad():
        alone = run_base(decoder, IDS[1:2, :5], MASK[1:2, :5])
        padded = run_base(decoder, IDS, MASK)
    torch.testing.assert_close(padded[1:2, :5], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", range(3))
def test_resuming_at_every_layer_equals_the_whole_forward(decoder: Decoder, k: int) -> None:
    hidden = capture_all(decoder, ("input",))[k, "input"]
    before, layers = count_hooks(decoder.model), list(decoder.layers)
    with torch.no_grad():
        whole = run_base(decoder, IDS, MASK)
        resumed = run_from(decoder, k, hidden, MASK)
    torch.testing.assert_close(real_positions(resumed), real_positions(whole))
    assert count_hooks(decoder.model) == before
    assert [a is b for a, b in zip(layers, decoder.layers, strict=True)] == [True] * len(layers)


def test_resuming_does_not_run_the_layers_below() -> None:
    decoder = find_decoder(shared_model("llama"))
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_args, index=index: ran.append(index))
        for index, layer in enumerate(decoder.layers)
    ]
    run_from(decoder, 2, torch.randn(3, 7, 32), MASK)
    for handle in handles:
        handle.remove()
    assert ran == [2]


def test_gradients_flow_through_the_frozen_rest_to_layer_k() -> None:
    decoder = find_decoder(make_model("qwen2"))
    weight = decoder.layers[1].mlp.down_proj.weight.requires_grad_()
    hidden = capture_all(decoder, ("input",))[1, "input"].requires_grad_()
    with capture(decoder, [(1, "mlp")]) as captured:
        run_from(decoder, 1, hidden, MASK).pow(2).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    assert captured[1, "mlp"].requires_grad
    assert decoder.layers[2].mlp.down_proj.weight.grad is None


@pytest.mark.parametrize("k", [0, 2])
def test_a_dropped_prefix_holds_no_weights_and_resumes_the_same(family: str, k: int) -> None:
    decoder = find_decoder(make_model(family))
    hidden = capture_all(decoder, ("input",))[k, "input"]
    with torch.no_grad():
        whole = run_base(decoder, IDS, MASK)
        shorter = drop_prefix(decoder, k)
        resumed = run_from(shorter, k, hidden, MASK)
    torch.testing.assert_close(real_positions(resumed), real_positions(whole))
    assert [sum(1 for _ in layer.parameters()) for layer in shorter.layers[:k]] == [0] * k
    assert sum(1 for _ in shorter.embed.parameters()) == 0
    assert isinstance(find_decoder(shorter.model).embed, PassThrough)


def test_capture_and_resume_leave_nothing_behind_after_an_exception() -> None:
    decoder = find_decoder(shared_model("gemma2"))
    before, layers = count_hooks(decoder.model), list(decoder.layers)
    with pytest.raises(ZeroDivisionError), capture(decoder, [(0, "attn"), (1, "input")]):
        raise ZeroDivisionError
    with (
        pytest.raises(UserError, match="did you mean 'mlp'"),
        capture(decoder, [(0, "attn"), (1, "mpl")]),
    ):
        pass
    with pytest.raises(RuntimeError):  # a width that layer 1 cannot take
        run_from(decoder, 1, torch.randn(3, 7, 31), MASK)
    assert count_hooks(decoder.model) == before
    assert [a is b for a, b in zip(layers, decoder.layers, strict=True)] == [True] * len(layers)


def test_post_norm_families_capture_after_the_norm() -> None:
    for family in ("gemma2", "gemma3", "olmo2"):
        layer = find_decoder(shared_model(family)).layers[0]
        assert sublayer(layer, "attn") is layer.post_attention_layernorm
        assert sublayer(layer, "mlp") is layer.post_feedforward_layernorm
    layer = find_decoder(shared_model("gemma")).layers[0]
    assert sublayer(layer, "attn") is layer.self_attn.o_proj


def test_other_shapes_are_refused() -> None:
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)
    )
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(**tiny, intermediate_size=16, vocab_size=20)
    )
    for model in (gpt2, bert, nn.Linear(2, 2)):
        with pytest.raises(UserError, match="has not the shape of a Llama-like decoder"):
            find_decoder(model)


def test_a_model_without_lm_head_is_refused() -> None:
    headless = transformers.LlamaModel(make_config("llama"))
    with pytest.raises(UserError, match="LlamaModel has no LM head"):
        find_decoder(headless)
    classifier = transformers.LlamaForSequenceClassification(make_config("llama"))
    with pytest.raises(UserError, match="no LM head"):
        find_decoder(classifier)


def test_a_scaled_residual_is_refused() -> None:
    granite = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=20,
            residual_multiplier=0.5,
            initializer_range=0.3,
            pad_token_id=0,
        )
    )
    with pytest.raises(UserError, match="layer 1 \\(counted from 1\\) does not compute"):
        verify_structure(find_decoder(granite.eval()))
