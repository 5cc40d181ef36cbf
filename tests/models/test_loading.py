from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import dispatch_model
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from semalign.errors import UserError
from semalign.models.decoder import capture, find_decoder, run_base, verify_structure
from semalign.models.fingerprints import model_fingerprint, tokenizer_fingerprint
from semalign.models.loading import load_config, load_model, load_tokenizer, model_folder
from semalign.models.vocabulary import vocabulary_overlap
from tests.models.architectures import (
    make_config,
    make_tokenizer,
    right_padded_batch,
    save_checkpoint,
)

IDS, MASK = right_padded_batch()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_loaded_model_is_frozen_and_whole(checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype="bfloat16", device="cpu")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    verify_structure(find_decoder(model))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_a_truncated_model_computes_the_first_layers(family: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, family)
    whole, truncated = load_model(folder), load_model(folder, num_layers=2)
    decoder = find_decoder(truncated)
    assert len(decoder.layers) == 2
    assert sum(p.numel() for p in truncated.parameters()) < sum(
        p.numel() for p in whole.parameters()
    )
    with torch.no_grad():
        with capture(decoder, [(1, "mlp")]) as found:
            run_base(decoder, IDS, MASK)
        with capture(find_decoder(whole), [(1, "mlp")]) as expected:
            run_base(find_decoder(whole), IDS, MASK)
    torch.testing.assert_close(found[1, "mlp"], expected[1, "mlp"])


@torch.no_grad()
def attention_outputs(model: nn.Module, layers: int) -> list[torch.Tensor]:
    decoder = find_decoder(model)
    with capture(decoder, [(layer, "attn") for layer in range(layers)]) as captured:
        run_base(decoder, IDS, MASK)
    return [captured[layer, "attn"][MASK.bool()] for layer in range(layers)]


@pytest.mark.parametrize("cap", [5.0, 50.0])
@pytest.mark.parametrize("family", ["gemma2", "vaultgemma"])
def test_a_soft_cap_on_attention_logits_is_kept(family: str, cap: float, tmp_path: Path) -> None:
    changes = {"attn_logit_softcapping": cap, "initializer_range": 0.3}
    folder = save_checkpoint(tmp_path, family, **changes)
    eager = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    expected = attention_outputs(eager.eval(), 3)
    for layers in (3, 2):
        found = attention_outputs(load_model(folder, num_layers=layers), layers)
        for ours, theirs in zip(found, expected[:layers], strict=True):
            assert torch.equal(ours, theirs)
    uncapped = attention_outputs(load_model(folder, attn="sdpa"), 3)
    assert max((a - b).abs().max() for a, b in zip(uncapped, expected, strict=True)) > 1e-3


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, "sdpa"),
        ("gemma3", {}, "sdpa"),
        ("gemma2", {}, "eager"),
        ("gemma2", {"attn_logit_softcapping": None}, "sdpa"),
    ],
)
def test_fused_attention_is_used_where_it_computes_the_same(
    family: str, changes: dict[str, None], expected: str, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path, family, **changes)
    assert load_model(folder).config._attn_implementation == expected
    assert load_model(folder, attn="eager").config._attn_implementation == "eager"


def test_attention_sinks_are_computed(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(tmp_path).config._attn_implementation == "eager"


def test_too_many_layers_are_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="has 3 layers, 4 were asked for"):
        load_model(checkpoint, num_layers=4)


def test_a_model_spread_over_memory_and_disk_computes_the_same(
    checkpoint: Path, tmp_path: Path
) -> None:
    whole = find_decoder(load_model(checkpoint))
    placement = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    placement |= {"model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    spread = dispatch_model(
        load_model(checkpoint), {**placement, "lm_head": "disk"}, offload_dir=str(tmp_path)
    )
    decoder = find_decoder(spread)
    assert decoder.layers[0].mlp.up_proj.weight.device.type == "meta"
    verify_structure(decoder)
    with torch.no_grad():
        torch.testing.assert_close(run_base(decoder, IDS, MASK), run_base(whole, IDS, MASK))


def test_missing_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        model_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="model 'zoo/nothing' is not shipped"):
        model_folder("zoo/nothing")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        model_folder(tmp_path)


def test_a_hub_that_does_not_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither an existing folder nor available from the model"):
        model_folder("nobody/no-such-model")


def test_a_checkpoint_without_lm_head_is_refused(tmp_path: Path) -> None:
    transformers.LlamaModel(make_config("llama")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks lm_head\.weight$"):
        load_model(tmp_path)


def test_missing_weights_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    for layer in (0, 2):
        del weights[f"model.layers.{layer}.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight and 1 more tensors"):
        load_model(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    edit_json(copy / "config.json", vocab_size=50)
    with pytest.raises(
        UserError, match=r"lm_head\.weight has shape \(48, 32\), expected \(50, 32\)"
    ):
        load_model(copy)


def test_other_wrong_models_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'float32'"):
        load_model(copy, dtype="float23")
    (copy / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(copy)
    edit_json(copy / "config.json", model_type="llamma")
    with pytest.raises(UserError, match="cannot be used"):
        load_config(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be used"):
        load_config(copy)
    t5 = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8, "vocab_size": 9}
    transformers.T5Config(**t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(tmp_path / "t5")


def test_tokenizers_pad_on_the_right(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer(["w1 w2", "w3"], padding=True)["attention_mask"] == [[1, 1], [1, 0]]
    transformers.LlamaConfig().save_pretrained(tmp_path)
    make_tokenizer(["a"], pad_token=None, padding_side="left").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "</s>"
    assert load_tokenizer(tmp_path).padding_side == "right"


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer can be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer files"):
        tokenizer_fingerprint(tmp_path)
    with pytest.raises(UserError, match=r"holds no .* weights"):
        model_fingerprint(tmp_path)


def test_fingerprints_follow_content_alone(checkpoint: Path, copy: Path) -> None:
    before = model_fingerprint(checkpoint), tokenizer_fingerprint(checkpoint)
    assert (model_fingerprint(copy), tokenizer_fingerprint(copy)) == before
    edit_json(copy / "config.json", transformers_version="9.9", _name_or_path="elsewhere")
    assert model_fingerprint(copy) == before[0]
    edit_json(copy / "config.json", rope_theta=123.0)
    assert model_fingerprint(copy) != before[0]
    edit_json(copy / "tokenizer_config.json", eos_token="<pad>")
    assert tokenizer_fingerprint(copy) != before[1]


def test_one_changed_weight_changes_the_fingerprint(checkpoint: Path, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprint(copy) != model_fingerprint(checkpoint)


def test_vocabularies_are_matched_by_what_tokens_stand_for() -> None:
    student = make_tokenizer(["a", "b", "c"])
    teacher = make_tokenizer(["c", "x", "a"])
    teacher.add_tokens(["[PAD]", "b"])
    overlap = vocabulary_overlap(student, teacher)
    # special tokens 0-3 in both; student a b c = 4 5 6; teacher c x a = 4 5 6, [PAD] b = 7 8
    assert overlap.student_ids.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert overlap.teacher_ids.tolist() == [0, 1, 2, 3, 6, 8, 4]
    assert overlap.student_to_teacher.tolist() == [0, 1, 2, 3, 6, 8, 4]
    assert overlap.fraction == 1


def test_tokens_beyond_the_lm_head_do_not_count() -> None:
    student, teacher = make_tokenizer(["a", "b", "c", "d"]), make_tokenizer(["b", "e", "a"])
    overlap = vocabulary_overlap(student, teacher, student_rows=10, teacher_rows=6)
    assert overlap.student_ids.tolist() == [0, 1, 2, 3, 5]  # a is row 6 of the teacher: no basis
    assert overlap.student_to_teacher.tolist() == [0, 1, 2, 3, -1, 4, -1, -1, -1, -1]
    assert overlap.fraction == 5 / 8


def test_one_extra_entry_in_the_teacher() -> None:
    words = [f"w{n}" for n in range(20)]
    student, teacher = make_tokenizer(words), make_tokenizer(words)
    teacher.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    overlap = vocabulary_overlap(student, teacher)
    assert overlap.fraction == 1 and len(overlap.student_ids) == 24
    assert vocabulary_overlap(teacher, student).fraction == 24 / 25


def test_disjoint_vocabularies() -> None:
    overlap = vocabulary_overlap(only("a"), only("B"))
    assert overlap.fraction == 0 and len(overlap.student_ids) == 0


def only(word: str) -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: 0}, unk_token=word))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
