from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from semalign import zoo
from semalign.config.sections import Seeking
from semalign.data.batches import pad, position_mask
from semalign.data.tokens import tokenise
from semalign.errors import UserError
from semalign.methods.seeking.factors import seek
from semalign.models.adapters import load_trainable_state, trainable_state
from semalign.models.decoder import find_decoder, logits, run_base
from semalign.models.injection import (
    count_trainable,
    exports_adapter,
    find_modules,
    inject,
    save_injected,
    save_merged,
)
from semalign.models.loading import load_model, load_tokenizer
from semalign.models.peft_folder import adapter_config, adapter_rank, check_adapter
from semalign.models.vocabulary import vocabulary_overlap
from semalign.tasks import load_split
from tests.models.architectures import make_model, right_padded_batch, save_checkpoint
from tests.reference import seeking as reference

IDS, MASK = right_padded_batch()
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL = (*LINEAR, "embed_tokens", "lm_head")


@dataclass(frozen=True)
class Random:
    """Factors large enough that leaving one out would be seen."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    blocks: dict[str, Tensor] = field(default_factory=dict)


def random_factors(model: nn.Module, modules: tuple[str, ...], rank: int = 4) -> Random:
    torch.manual_seed(3)
    pairs, blocks = {}, {}
    for path in find_modules(model, modules).values():
        weight = model.get_submodule(path).weight
        n, m = weight.T.shape if path.endswith("embed_tokens") else weight.shape
        r = min(rank, n, m)
        pairs[path] = (0.2 * torch.randn(n, r), 0.2 * torch.randn(r, m))
        blocks[path] = 0.1 * torch.randn(weight.shape)
    return Random(pairs, blocks)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]


def train(model: nn.Module, steps: int = 3) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        optimiser.step()
    model.eval()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "gemma", "gemma2"])
def test_the_student_starts_as_itself(family: str) -> None:
    base = make_model(family)
    expected, factors = outputs(base), random_factors(base, ALL)
    scale = expected.abs().max().item()
    model = inject(base, factors, dropout=0.1)
    torch.testing.assert_close(outputs(model), expected, atol=1e-5 * scale, rtol=1e-5)
    with model.disable_adapter():  # W itself is as it was
        assert torch.equal(outputs(model), expected)
    model.base_model.set_adapter("default")  # and the factors do change the outputs
    assert (outputs(model) - expected).abs().max() > 0.1 * scale


@pytest.mark.parametrize("modules", [LINEAR, ("up_proj", "down_proj", "v_proj", "o_proj"), ALL])
def test_a_trained_model_says_what_the_literal_weights_say(modules: tuple[str, ...]) -> None:
    model = make_model("llama")
    factors = random_factors(model, modules)
    injected = inject(model, factors)
    train(injected)
    literal = make_model("llama")
    state = trainable_state(injected)
    for path, origin in factors.pairs.items():
        prefix = f"base_model.model.{path}.lora_"
        if path.endswith("embed_tokens"):
            b, a = (state[f"{prefix}embedding_{x}.default"] for x in "BA")
        else:
            b, a = (state[f"{prefix}{x}.default.weight"] for x in "BA")
        assert not torch.equal(b, origin[0]) and not torch.equal(a, origin[1])
        weight = literal.get_submodule(path).weight
        flip = path.endswith("embed_tokens")
        now = reference.transferred(weight.T if flip else weight, (b, a), origin)
        weight.copy_(now.T if flip else now)
    torch.testing.assert_close(outputs(injected), outputs(literal), atol=1e-4, rtol=1e-4)


def test_only_the_trained_branch_is_trainable_in_float32_and_dropped_out() -> None:
    base = make_model("llama").bfloat16()
    model = inject(base, random_factors(base, ALL), dropout=0.5)
    state = trainable_state(model)
    assert len(state) == 2 * (3 * 7 + 2)
    assert all(".default" in name and "lora_" in name for name in state)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    head = model.get_base_model().lm_head
    assert isinstance(head.lora_dropout["default"], nn.Dropout)
    assert isinstance(head.lora_dropout["origin"], nn.Identity)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    train(model, steps=1)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    trained = outputs(model)
    load_trainable_state(model, state)
    assert not torch.equal(outputs(model), trained)


def test_torchs_random_state_is_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    base = make_model("llama")
    factors = random_factors(base, ALL)
    torch.manual_seed(7)
    inject(base, factors)
    assert torch.equal(torch.rand(3), expected)


def test_the_training_loop_finds_the_decoder_inside() -> None:
    base = make_model("llama")
    expected = outputs(base)
    model = inject(base, random_factors(base, ALL))
    decoder = find_decoder(model)
    with torch.no_grad():
        found = logits(decoder, run_base(decoder, IDS, MASK))[MASK.bool()]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_subtracted_block_is_gone_from_the_weights(family: str) -> None:
    factors = random_factors(make_model(family), ALL)
    model = inject(make_model(family), factors, subtract="block")
    literal = make_model(family)
    literal.lm_head.weight = nn.Parameter(literal.lm_head.weight.clone(), requires_grad=False)
    for path, (b, a) in factors.pairs.items():
        product = (b @ a).T if path.endswith("embed_tokens") else b @ a
        literal.get_submodule(path).weight.add_(product - factors.blocks[path])
    torch.testing.assert_close(outputs(model), outputs(literal), atol=1e-4, rtol=1e-4)
    assert (outputs(model) - outputs(make_model(family))).abs().max() > 0.1
    assert all(".default" in name for name in trainable_state(model))


@pytest.mark.parametrize("rank", [4, 20])  # k and v are 16 x 32 of this family: 20 is clipped there
def test_an_adapter_loads_in_plain_transformers_and_peft(rank: int, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    for folder in ("one", "two"):
        student = load_model(base)
        model = inject(student, random_factors(student, LINEAR, rank), dropout=0.1)
        torch.manual_seed(0)
        train(model)
        assert exports_adapter(model)
        save_injected(model, tmp_path / folder, base)
    one, two = tmp_path / "one", tmp_path / "two"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(one))
    torch.testing.assert_close(outputs(plain), outputs(model), atol=1e-5, rtol=1e-5)
    assert (outputs(plain) - outputs(load_model(base))).abs().max() > 1e-2
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(file.name for file in one.iterdir()) == names
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    config = adapter_config(one)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == str(base)
    assert config["r"] == config["lora_alpha"] == adapter_rank(one) == 2 * rank
    clipped = {path: 32 for path in config["target_modules"] if path[-6:] in ("k_proj", "v_proj")}
    assert config["rank_pattern"] == config["alpha_pattern"] == (clipped if rank == 20 else {})
    tensors = load_file(one / "adapter_model.safetensors")
    head = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    assert tensors[f"{head}A.weight"].shape == (2 * rank, 32)
    assert tensors[f"{head}B.weight"].shape == (32, 2 * rank)
    check_adapter(one, base)


@pytest.mark.parametrize("subtract", ["low_rank", "block"])
@pytest.mark.parametrize(("family", "modules"), [("llama", ALL), ("llama-tied", ALL),
                                                 ("llama-tied", ("embed_tokens",)),
                                                 ("llama-tied", LINEAR)])  # fmt: skip
def test_a_merged_checkpoint_is_ordinary(
    family: str, modules: tuple[str, ...], subtract: str, tmp_path: Path
) -> None:
    base = save_checkpoint(tmp_path / "base", family)
    student = load_model(base)
    model = inject(student, random_factors(student, modules), dropout=0.1, subtract=subtract)
    train(model)
    assert exports_adapter(model) == (subtract == "low_rank" and modules == LINEAR)
    save_merged(model, tmp_path / "merged", base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged), outputs(model), atol=1e-4, rtol=1e-4)
    tied = family == "llama-tied" and modules == LINEAR
    assert merged.config.tie_word_embeddings == tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert merged.dtype == torch.float32
    words = AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
    assert words == load_tokenizer(base).get_vocab()
    assert outputs(load_model(tmp_path / "merged")).equal(outputs(merged))


def test_an_untrained_merge_is_the_base_to_the_bit(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    student = load_model(base)
    save_merged(inject(student, random_factors(student, ALL)), tmp_path / "merged", base)
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("base", "merged"))
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize("route", ["adapter", "merged"])
def test_the_shipped_student_scores_the_same_from_disk(route: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("zoo/student")
    rows = load_split(zoo.path("zoo/data"), "mmlu", "extract")[:4]
    tokens = tokenise(rows, tokenizer, max_length=512)
    overlap = vocabulary_overlap(tokenizer, load_tokenizer("zoo/teacher"))
    student, modules = load_model("zoo/student"), LINEAR if route == "adapter" else ALL
    factors = seek(
        load_model("zoo/teacher"), student.config, tokens, Seeking(modules=modules),
        (overlap.student_ids, overlap.teacher_ids),
    )  # fmt: skip
    ids, mask = pad(tokens, 0)
    answers = position_mask(tokens, lambda e: e.supervised_positions, ids.shape[1])
    labels = ids.roll(-1, 1)[answers]

    def score(model: nn.Module) -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits[answers]
        return nn.functional.cross_entropy(logits, labels)

    before = score(student).item()
    model = inject(student, factors)
    assert score(model).item() == pytest.approx(before, rel=1e-4)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    for _ in range(2):
        optimiser.zero_grad()
        score(model).backward()
        optimiser.step()
    trained = score(model).item()
    assert trained < before - 0.01
    path = zoo.path("zoo/student")
    if route == "adapter":
        save_injected(model, tmp_path, "zoo/student")
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        again = PeftModel.from_pretrained(plain, str(tmp_path))
    else:
        save_merged(model, tmp_path, "zoo/student")
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert score(again.eval()).item() == pytest.approx(trained, rel=1e-4)


def test_trained_parameters_of_llama_2_7b_and_of_a_clipped_rank() -> None:
    seven = LlamaConfig(num_key_value_heads=32)
    assert count_trainable(seven, ALL, 16) == 41_132_032
    assert count_trainable(seven, ("up_proj", "down_proj", "v_proj", "o_proj"), 16) == 23_855_104
    base = make_model("llama")
    for rank in (4, 20):
        model = inject(make_model("llama"), random_factors(base, ALL, rank))
        counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count_trainable(base.config, ALL, rank) == counted
    one = count_trainable(base.config, LINEAR, 4, layers=1)
    assert 3 * one == count_trainable(base.config, LINEAR, 4)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    factors = random_factors(make_model("llama"), ALL)
    with pytest.raises(UserError, match="did you mean 'low_rank'"):
        inject(make_model("llama"), factors, subtract="lowrank")
    with pytest.raises(UserError, match="hold no block of lm_head"):
        inject(make_model("llama"), Random(factors.pairs), subtract="block")
    with pytest.raises(UserError, match=r"has no model\.layers\.2"):
        inject(make_model("llama", num_hidden_layers=2), factors)
    with pytest.raises(UserError, match="embed_tokens are for 32 x 48, the student's is 24 x 48"):
        inject(make_model("llama", hidden_size=24), factors)
    model = inject(make_model("llama"), factors)
    with pytest.raises(UserError, match="do not go into an adapter"):
        save_injected(model, tmp_path, "base")
    assert not list(tmp_path.iterdir())
