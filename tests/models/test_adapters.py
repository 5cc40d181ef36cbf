from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from semalign.errors import UserError
from semalign.models.adapters import (
    full_layers,
    load_adapter,
    load_trainable_state,
    lora_on_layers,
    merge_adapter,
    save_adapter,
    trainable_state,
)
from semalign.models.decoder import capture, find_decoder, logits, run_base, verify_structure
from semalign.models.loading import (
    attention_implementation,
    load_config,
    load_model,
    load_tokenizer,
)
from semalign.models.partial import drop_prefix, run_from
from tests.models.architectures import make_model, right_padded_batch, save_checkpoint

IDS, MASK = right_padded_batch()
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]


def train(model: nn.Module, steps: int = 3) -> None:
    """A few real optimiser steps, so that the adapter does something."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        optimiser.step()
    model.eval()


def trained_lora(base: nn.Module, layers: list[int], seed: int = 0) -> PeftModel:
    model = lora_on_layers(base, layers, rank=4, seed=seed)
    train(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_changes_layer_k_alone(family: str) -> None:
    model = lora_on_layers(make_model(family), [1], rank=4, alpha=8)
    names = list(trainable_state(model))
    assert len(names) == 8  # A and B on up, down, v and o
    assert all(".layers.1." in name and "lora_" in name for name in names)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    initial = outputs(model)
    torch.testing.assert_close(initial, outputs(make_model(family)))  # B = 0: the student itself
    train(model)
    assert (outputs(model) - initial).abs().max() > 1e-3
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(before[name], parameter)


def test_lora_keeps_the_structure_and_is_seen_by_capture() -> None:
    base = make_model("llama")
    with torch.no_grad(), capture(find_decoder(base), [(1, "attn"), (1, "mlp")]) as plain:
        run_base(find_decoder(base), IDS, MASK)
    decoder = find_decoder(trained_lora(base, [1]))
    verify_structure(decoder)
    with torch.no_grad(), capture(decoder, [(1, "attn"), (1, "mlp")]) as adapted:
        run_base(decoder, IDS, MASK)
    for interface in ("attn", "mlp"):
        assert (adapted[1, interface] - plain[1, interface]).abs().max() > 1e-3


def test_the_seed_decides_the_initial_adapter_and_nothing_else() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    states = [trainable_state(lora_on_layers(make_llama(), [0], seed=seed)) for seed in (5, 5, 6)]
    assert torch.equal(torch.rand(3), expected)
    name = next(name for name in states[0] if "lora_A" in name)
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def make_llama() -> nn.Module:
    with torch.random.fork_rng():
        return make_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_loads_in_plain_transformers_and_peft(family: str, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", family)
    model = trained_lora(load_model(base), [0, 2])
    save_adapter(model, tmp_path / "adapter", base)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["layers_to_transform"] is None and len(config["target_modules"]) == 8
    assert {path.split(".")[2] for path in config["target_modules"]} == {"0", "2"}
    attention = attention_implementation(load_config(base))  # plain transformers drops a soft cap
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention),
        str(tmp_path / "adapter"),
    )
    assert torch.equal(outputs(plain.eval()), outputs(model))
    loaded = load_adapter(load_model(base), tmp_path / "adapter")
    assert torch.equal(outputs(loaded), outputs(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_equal_adapters_are_saved_as_equal_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        save_adapter(trained_lora(load_model(checkpoint), [1]), tmp_path / folder, checkpoint)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    names = set(load_file(tmp_path / "one" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight" in names
    paths = ["mlp.down_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.v_proj"]
    assert config["target_modules"] == [f"model.layers.1.{path}" for path in paths]


def test_an_adapter_trained_without_the_prefix_fits_the_whole_model(
    checkpoint: Path, tmp_path: Path
) -> None:
    whole = find_decoder(load_model(checkpoint))
    with torch.no_grad(), capture(whole, [(1, "input")]) as captured:
        run_base(whole, IDS, MASK)
    model = lora_on_layers(load_model(checkpoint), [1], rank=4)
    decoder = drop_prefix(find_decoder(model), 1)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        hidden = run_from(decoder, 1, captured[1, "input"], MASK)
        nn.functional.cross_entropy(
            logits(decoder, hidden[MASK.bool()]), IDS[MASK.bool()]
        ).backward()
        optimiser.step()
    save_adapter(model, tmp_path, checkpoint)
    with torch.no_grad():
        expected = logits(decoder, run_from(decoder, 1, captured[1, "input"], MASK)[MASK.bool()])
    found = outputs(load_adapter(load_model(checkpoint), tmp_path))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_adapter_equals_the_adapter_at_run_time(family: str, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", family)
    model = trained_lora(load_model(base), [1])
    save_adapter(model, tmp_path / "adapter", base)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged), outputs(model), atol=1e-5, rtol=1e-5)
    assert load_tokenizer(tmp_path / "merged").get_vocab() == load_tokenizer(base).get_vocab()


def test_full_layers_are_trained_saved_loaded_and_merged(checkpoint: Path, tmp_path: Path) -> None:
    model = full_layers(load_model(checkpoint), [2])
    assert all(".layers.2." in name for name in trainable_state(model))
    before = outputs(model)
    train(model)
    save_adapter(model, tmp_path / "adapter", checkpoint)
    assert set(load_file(tmp_path / "adapter" / "layer_weights.safetensors")) == set(
        trainable_state(model)
    )
    loaded = load_adapter(load_model(checkpoint), tmp_path / "adapter")
    merge_adapter(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    assert (outputs(model) - before).abs().max() > 1e-3
    assert torch.equal(outputs(loaded), outputs(model))
    assert torch.equal(outputs(load_model(tmp_path / "merged")), outputs(model))


def test_trainable_state_goes_back_in_place(checkpoint: Path) -> None:
    model = trained_lora(load_model(checkpoint), [1])
    state, expected = trainable_state(model), outputs(model)
    train(model)
    assert not torch.equal(outputs(model), expected)
    load_trainable_state(model, state)
    assert torch.equal(outputs(model), expected)


def test_what_does_not_fit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'up_proj'"):
        lora_on_layers(load_model(checkpoint), [0], target_modules=["up_prj"])
    with pytest.raises(UserError, match=r"student layer 4 is out of range: .* 1\.\.3"):
        lora_on_layers(load_model(checkpoint), [3])
    with pytest.raises(UserError, match=r"student layer 0 is out of range"):
        full_layers(load_model(checkpoint), [-1])
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter(load_model(checkpoint), tmp_path)
    save_adapter(trained_lora(load_model(checkpoint), [1]), tmp_path / "adapter", checkpoint)
    with pytest.raises(UserError, match="does not fit the model"):
        load_adapter(make_model("llama", hidden_size=24), tmp_path / "adapter")
    model = lora_on_layers(load_model(checkpoint), [1])
    with pytest.raises(UserError, match="other trainable parameters"):
        load_trainable_state(model, trainable_state(trained_lora(load_model(checkpoint), [0])))
    with pytest.raises(UserError, match="has shape"):
        load_trainable_state(model, trainable_state(trained_lora(load_model(checkpoint), [1])))
