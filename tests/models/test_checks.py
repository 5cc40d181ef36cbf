"""Models that are not what their files describe, or that no method can use: one line each, from
`Model.open` and `check_supported`, which plans and runs share.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from semalign.config.jobs import Config
from semalign.config.read import resolve
from semalign.errors import UserError
from semalign.methods.method import Transfer
from semalign.models.adapters import lora_on_layers, merge_adapter, save_adapter
from semalign.models.decoder import find_decoder, verify_structure
from semalign.models.heads import find_lm_head
from semalign.models.loading import load_model, load_tokenizer, model_folder, save_model
from semalign.models.reading import reading
from semalign.models.reference import Model
from semalign.models.support import check_lora, check_supported
from semalign.models.tokenizer import check_tokenizer

STUDENT = model_folder("zoo/student")
TARGETS = ("up_proj", "down_proj", "v_proj", "o_proj")
SMALL: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """zoo/student, to be damaged."""
    return Path(shutil.copytree(STUDENT, tmp_path / "copy"))


def opened(folder: Path, *, planned: bool = True) -> Model:
    return Model.open(str(folder), dtype="float32", planned=planned)


def refusal(folder: Path) -> str:
    """The one line that both a plan and a run end in."""
    lines = []
    for planned in (True, False):
        with pytest.raises(UserError) as caught:
            check_supported(opened(folder, planned=planned))
        lines.append(str(caught.value))
    assert lines[0] == lines[1] and "\n" not in lines[0] and len(lines[0]) < 600
    return lines[0]


def of(name: str, folder: Path, **changes: Any) -> Path:
    """A random model by its configuration class, with the zoo's tokenizer."""
    config = getattr(transformers, name)(**SMALL | changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer(STUDENT).save_pretrained(folder)
    return folder


# weights


def test_whole_models_pass(copy: Path) -> None:
    check_supported(opened(copy))
    check_supported(opened(copy, planned=False))


def lfs_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 12\n"
    (folder / "model.safetensors").write_text(text)


def half(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def nothing(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def removed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def missing(folder: Path) -> None:
    change(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def left_over(folder: Path) -> None:
    change(folder, lambda w: w.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}))


def fp8_scales(folder: Path) -> None:
    scale = {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2, 1)}
    change(folder, lambda weights: weights.update(scale))


def another_shape(folder: Path) -> None:
    change(folder, lambda w: w.update({"model.norm.weight": torch.ones(7)}))


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    how(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shards(folder: Path) -> None:
    load_model(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


def missing_shard(folder: Path) -> None:
    shards(folder)
    sorted(folder.glob("model-0*.safetensors"))[1].unlink()


def wrong_index(folder: Path) -> None:
    shards(folder)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={**listed, "model.bias": listed["model.norm.weight"]})


def damaged_index(folder: Path) -> None:
    shards(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def two_sets(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    shards(folder)
    (folder / "model.safetensors").write_bytes(whole)


def adapter_beside(folder: Path) -> None:
    save_adapter(lora_on_layers(load_model(folder), [0]), folder, folder)


def tied_with_another_head(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lfs_pointer, "model.safetensors is a git-lfs pointer and holds no weights"),
        (half, "model.safetensors is damaged or not complete: "),
        (nothing, "model.safetensors is damaged or not complete: "),
        (removed, "no model.safetensors; expected weights in safetensors format"),
        (missing, "checkpoint lacks model.layers.1.mlp.up_proj.weight"),
        (left_over, "its weights hold model.layers.9.mlp.up_proj.weight, which that model has not"),
        (fp8_scales, "its weights hold model.layers.0.mlp.up_proj.weight_scale_inv"),
        (another_shape, "model.norm.weight has shape (7,), expected (128,)"),
        (missing_shard, "files are not there, such as model-00002-of-"),
        (wrong_index, "model.bias is not in model-0"),
        (damaged_index, "model.safetensors.index.json cannot be read: "),
        (two_sets, "holds both model.safetensors and model.safetensors.index.json"),
        (adapter_beside, "also holds adapter_config.json"),
        (
            tied_with_another_head,
            "have an LM head (lm_head.weight) that differs from the embedding",
        ),
    ],
)
def test_weights_that_are_not_what_is_run(
    copy: Path, damage: Callable[[Path], None], expected: str
) -> None:
    damage(copy)
    assert expected in refusal(copy)


def test_shards_are_weights_too(copy: Path) -> None:
    shards(copy)
    check_supported(opened(copy, planned=False))


def test_a_stored_head_that_is_the_embedding_is_no_fault(copy: Path) -> None:
    change(copy, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    edit(copy / "config.json", tie_word_embeddings=True)
    check_supported(opened(copy))
    assert find_lm_head(str(copy))[1] == "lm_head.weight"


def test_a_mixture_of_experts_is_stored_under_other_names(tmp_path: Path) -> None:
    opened(of("MixtralConfig", tmp_path, num_local_experts=2))


def test_an_adapter_alone_is_no_model(copy: Path, tmp_path: Path) -> None:
    save_adapter(lora_on_layers(load_model(copy), [0]), tmp_path / "adapter", copy)
    assert "holds no config.json, but an adapter; expected its base" in refusal(
        tmp_path / "adapter"
    )


# configurations


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1},
        {"hidden_size": "128"},
        {"num_attention_heads": 5},
        {"model_type": "llamma"},
        {"rope_parameters": {"rope_type": "of-another-kind"}},
        {"hidden_act": "no-such-function"},
        {"pad_token_id": 5000},
    ],
)
def test_configurations_that_transformers_refuses(copy: Path, changes: dict[str, object]) -> None:
    edit(copy / "config.json", **changes)
    assert str(copy) in refusal(copy)


@pytest.mark.parametrize("kinds", [["full_attention"], ["full_attention", "foo_attention"]])
def test_layer_types_that_do_not_fit(tmp_path: Path, kinds: list[str]) -> None:
    of("Qwen2Config", tmp_path)
    edit(tmp_path / "config.json", layer_types=kinds)
    assert "layer_types" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("gptq", {"bits": 4, "group_size": 128}),
        ("awq", {"bits": 4, "group_size": 128}),
        ("bitsandbytes", {"load_in_4bit": True}),
        ("fp8", {"weight_block_size": [128, 128]}),
        ("compressed-tensors", {"format": "pack-quantized", "config_groups": {}}),
        ("mxfp4", {}),
    ],
)
def test_quantised_models(copy: Path, method: str, more: dict[str, object]) -> None:
    edit(copy / "config.json", quantization_config={"quant_method": method, **more})
    assert f"is quantised (quantization_config of its config.json: {method})" in refusal(copy)
    with pytest.raises(UserError, match="dequantise it first"):
        load_model(copy)


# architectures


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("GraniteConfig", {"residual_multiplier": 0.5}, "block_in + attn + mlp = block_out"),
        ("GraniteConfig", {"logits_scaling": 4.0}, "the LM head does not turn"),
        ("CohereConfig", {}, "the LM head does not turn the last hidden state into the logits"),
        (
            "MiniCPM3Config",
            {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4},
            "expected a plain residual stream",
        ),
        ("GPTNeoXConfig", {}, "has not the shape of a Llama-like decoder"),
        ("PhiConfig", {}, "has not the shape of a Llama-like decoder"),
    ],
)
def test_architectures_of_another_shape(
    tmp_path: Path, name: str, changes: dict[str, object], expected: str
) -> None:
    line = refusal(of(name, tmp_path, **changes))
    assert line.startswith(f"model '{tmp_path}' is not supported: ") and expected in line


EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
GLM4 = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("Phi3Config", {}, "student layer 1 (counted from 1) has no linear module 'up_proj'"),
        ("GlmConfig", {"head_dim": 8}, "has no linear module 'up_proj'"),
        ("Starcoder2Config", {}, "has no linear module 'up_proj'"),
        ("MixtralConfig", {"num_local_experts": 2}, "has no linear module 'up_proj'"),
        ("Qwen3MoeConfig", {"num_experts": 4, **EXPERTS}, "has no linear module 'up_proj'"),
        ("Glm4MoeConfig", {**GLM4, **EXPERTS}, "Cannot convert PEFT target(s) up_proj"),
    ],
)
def test_students_without_the_targets(
    tmp_path: Path, name: str, changes: dict[str, object], expected: str
) -> None:
    model = opened(of(name, tmp_path, **changes))
    check_supported(model)
    with pytest.raises(UserError) as caught:
        check_lora(model, (0, 1), TARGETS)
    assert str(caught.value).startswith("training.lora.target_modules: ")
    assert expected in str(caught.value)


def planned(student: Path, *overrides: str) -> Config:
    small = ("teacher=zoo/student", "data.train_limit=8", "evaluation.tasks=[mmlu]")
    return resolve([], [f"student={student}", *small, *overrides])


@pytest.mark.parametrize("is_planned", [True, False])
@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        ((), "training.lora.target_modules: student layer 1"),
        (("method=sft-all",), "training.lora.target_modules: student layer 1"),
        (("method=seeking", "seeking.modules=[up_proj]"), "seeking.modules: layer 1"),
        (("method=laten",), "method=laten: layer 1"),
    ],
)
def test_a_student_of_another_form_is_refused_before_attribution(
    tmp_path: Path, overrides: tuple[str, ...], setting: str, is_planned: bool
) -> None:
    config = planned(of("Phi3Config", tmp_path / "phi"), f"workdir={tmp_path}", *overrides)
    with pytest.raises(UserError, match=f"^{setting}"):
        Transfer.of(config, planned=is_planned)


def test_a_student_whose_targets_are_named_is_accepted(tmp_path: Path) -> None:
    student = of("Phi3Config", tmp_path / "phi")
    targets = "training.lora.target_modules=[qkv_proj,o_proj,gate_up_proj,down_proj]"
    Transfer.of(planned(student, f"workdir={tmp_path}", targets), planned=True)


def test_layers_that_are_not_paired_may_be_of_another_form(tmp_path: Path) -> None:
    """The first layer of this model has an MLP, the second one experts."""
    kinds = {"num_experts": 4, "mlp_only_layers": [0], **EXPERTS}
    student = of("Qwen3MoeConfig", tmp_path / "moe", **kinds)
    explicit = ("pairing.strategy=explicit", "training.lora.target_modules=[down_proj]")
    explicit += (f"workdir={tmp_path}",)
    Transfer.of(planned(student, *explicit, "pairing.explicit=[[1,1]]"), planned=True)
    with pytest.raises(UserError, match=r"layer 2 .* has no linear module 'down_proj'"):
        Transfer.of(planned(student, *explicit, "pairing.explicit=[[1,2]]"), planned=True)


@pytest.mark.parametrize("family", ["gemma3", "got_ocr2"])
def test_no_lora_outside_the_decoder(tmp_path: Path, family: str) -> None:
    """A vision tower has linear modules of the same names, in layers of the same name."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    text = SMALL | {"head_dim": 8, "num_key_value_heads": 2, "bos_token_id": None}
    if family == "gemma3":
        base: Any = transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(
                text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=639
            )
        )
    else:
        base = transformers.GotOcr2ForConditionalGeneration(
            transformers.GotOcr2Config(
                text_config=text | {"model_type": "qwen2", "use_sliding_window": False},
                vision_config=vision
                | {"output_channels": 16, "mlp_dim": 16, "global_attn_indexes": [1]},
                image_token_index=639,
            )
        )
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(STUDENT).save_pretrained(tmp_path / "base")
    model = lora_on_layers(load_model(tmp_path / "base"), [1])
    verify_structure(find_decoder(model))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(TARGETS)
    assert all("language_model.layers.1." in name for name in trained)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    assert all(".language_model." in name for name in load_file(
        tmp_path / "adapter" / "adapter_model.safetensors"))  # fmt: skip


# tokenizers


def test_a_tokenizer_class_that_reads_other_rules(copy: Path) -> None:
    for name in ("LlamaTokenizerFast", "LlamaTokenizer"):
        edit(copy / "tokenizer_config.json", tokenizer_class=name)
        line = refusal(copy)
        assert "transformers tokenises otherwise than its tokenizer.json" in line
        assert "(tokenizer_class=LlamaTokenizer)" in line
    for name in ("GemmaTokenizerFast", "BertTokenizerFast"):
        edit(copy / "tokenizer_config.json", tokenizer_class=name)
        assert str(copy) in refusal(copy)
    edit(copy / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    opened(copy)


@pytest.mark.parametrize("kind", ["lower case", "unknown words", "lost spaces"])
def test_a_tokenizer_that_does_not_keep_a_text(copy: Path, kind: str) -> None:
    if kind == "unknown words":
        backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend = Tokenizer.from_file(str(copy / "tokenizer.json"))
        if kind == "lower case":
            backend.normalizer = normalizers.Lowercase()
        else:
            split, as_bytes = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(copy)
    assert "does not keep a text" in refusal(copy)


@pytest.mark.parametrize("name", ["eos_token", "bos_token"])
def test_a_special_token_without_a_row(copy: Path, name: str) -> None:
    tokenizer = load_tokenizer(copy)
    tokenizer.add_special_tokens({name: "<|im_end|>"})
    tokenizer.save_pretrained(copy)
    assert (
        f"{name} '<|im_end|>' of its tokenizer has the id 640, and its embedding has 640 rows"
        in (refusal(copy))
    )


def test_a_padding_token_without_a_row_is_harmless(copy: Path) -> None:
    tokenizer = load_tokenizer(copy)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(copy)
    assert load_tokenizer(copy).pad_token_id == 640
    opened(copy)


def ids(folder: Path) -> list[int]:
    return list(load_tokenizer(folder)("How many?")["input_ids"])


def around(folder: Path, *pieces: str) -> None:
    """Make the tokenizer put special tokens around a text, `A`."""
    known = {"<s>": 1, "</s>": 2}
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join("$A" if piece == "A" else piece for piece in pieces),
        special_tokens=list(known.items()),
    )
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("before", [[], ["<s>"]])
def test_no_prompt_ends_in_eos(copy: Path, before: list[str]) -> None:
    plain = ids(copy)
    around(copy, *before, "A", "</s>")
    as_stored = transformers.AutoTokenizer.from_pretrained(copy)("How many?")["input_ids"]
    assert as_stored == [*([1] if before else []), *plain, 2]
    assert ids(copy) == as_stored[:-1]
    opened(copy)


def test_never_two_bos(copy: Path) -> None:
    around(copy, "<s>", "<s>", "A")
    assert "begins a text with two <s>" in refusal(copy)


@pytest.mark.parametrize(
    ("model_type", "bos", "adds", "warned"),
    [
        ("gemma3_text", "<bos>", False, True),
        ("gemma2", "<bos>", True, False),
        ("vaultgemma", "<bos>", False, True),
        ("llama", "<|begin_of_text|>", False, True),
        ("qwen2", "<|endoftext|>", False, False),
        ("llama", "<s>", False, False),  # not of SentencePiece: never used
    ],
)
def test_a_missing_bos_is_one_warning(
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    model_type: str,
    bos: str,
    adds: bool,
    warned: bool,
) -> None:
    if adds:
        around(copy, "<s>", "A")
    text = (copy / "tokenizer.json").read_text().replace('"<s>"', json.dumps(bos))
    (copy / "tokenizer.json").write_text(text)
    edit(copy / "tokenizer_config.json", bos_token=bos)
    config = transformers.LlamaConfig(vocab_size=640)
    config.model_type = model_type
    for _ in range(2):  # said once
        check_tokenizer(copy, config, "fingerprint")
    printed = capsys.readouterr().out
    assert printed.count("\n") == warned
    assert printed.startswith(f"[tokenizer] {copy}: begins no text with {bos}, which") == warned


# saving


@pytest.mark.parametrize(
    "settings", [b'{"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}', b'{"top_k": 5}']
)
def test_a_generation_config_that_transformers_will_not_save_is_kept(
    copy: Path, settings: bytes
) -> None:
    (copy / "generation_config.json").write_bytes(settings)
    with pytest.raises(ValueError, match="GenerationConfig"):
        load_model(copy).save_pretrained(copy.parent / "plain")
    save_adapter(lora_on_layers(load_model(copy), [0]), copy.parent / "adapter", copy)
    merge_adapter(copy, copy.parent / "adapter", copy.parent / "merged")
    assert (copy.parent / "merged" / "generation_config.json").read_bytes() == settings
    save_model(load_model(copy), copy.parent / "whole", copy)  # a whole layer's, Seeking's, LaTen's
    assert (copy.parent / "whole" / "generation_config.json").read_bytes() == settings


def test_a_merged_model_has_all_files_of_its_base(copy: Path) -> None:
    (copy / "generation_config.json").unlink(missing_ok=True)
    for name in ("additional_chat_templates", "chat_templates", "onnx"):
        (copy / name).mkdir()
        (copy / name / "tool_use.jinja").write_text("{{ messages }}")
    for name in ("qwen.tiktoken", "spm.spm"):
        (copy / name).write_text("x")
    save_adapter(lora_on_layers(load_model(copy), [0]), copy.parent / "adapter", copy)
    merge_adapter(copy, copy.parent / "adapter", copy.parent / "merged")
    found = {str(f.relative_to(copy.parent / "merged")) for f in copy.parent.rglob("merged/**/*.*")}
    expected = {str(f.relative_to(copy)) for f in copy.rglob("*.*") if "onnx" not in f.parts}
    assert found == expected


# the boundary


@pytest.mark.parametrize("kind", [ValueError, OSError, KeyError, ImportError, RuntimeError])
def test_other_libraries_exceptions_become_one_line(kind: type[Exception]) -> None:
    with pytest.raises(UserError, match=r"^model 'm': .*first") as caught, reading("model 'm'"):
        raise kind("first\n\n second " + "tensor " * 1000)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("error", [UserError("ours"), MemoryError(), torch.OutOfMemoryError()])
def test_our_own_errors_and_a_lack_of_memory_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, reading("model"):
        raise error
    assert caught.value is error
