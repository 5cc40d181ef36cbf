"""Adapters that vLLM would refuse, or serve as something else, are refused in one line."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from semalign.errors import UserError
from semalign.models import peft_folder
from semalign.models.adapters import load_adapter
from semalign.models.peft_folder import adapter_config, adapter_rank, check_adapter
from tests.models.architectures import make_model, save_checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base"))


def saved(folder: Path, base: Path, kind: Any = peft.LoraConfig, **options: Any) -> Path:
    """What PEFT itself leaves of an adapter of that kind."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "o_proj"]} | options
    model = peft.get_peft_model(make_model("llama"), kind(**settings))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("plain"), base, task_type="CAUSAL_LM")


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 1}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"layers_to_transform": [1], "layers_pattern": "layers", "lora_dropout": 0.1},
    ],
)
def test_what_vllm_applies_is_accepted(options: Any, base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", base, **options)
    check_adapter(folder, base)
    assert adapter_rank(folder) == 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa; expected True, gaussian"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
        ({"bias": "lora_only"}, "bias=lora_only; expected none"),
        ({"lora_bias": True}, "lora_bias=True; expected none, or the adapter merged"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"trainable_token_indices": [3]}, "trainable_token_indices="),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication="),
    ],
)
def test_what_it_does_not_is_refused(options: Any, named: str, base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", base, **options)
    with pytest.raises(UserError, match=r"vLLM does not serve ") as error:
        check_adapter(folder, base)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["AdaLoraConfig", "LoHaConfig", "IA3Config", "LoKrConfig"])
def test_other_kinds_of_adapters_are_refused(kind: str, base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["v_proj"]}
    if kind == "AdaLoraConfig":
        options["total_step"] = 10
    if kind == "IA3Config":
        options["feedforward_modules"] = []
    model = peft.get_peft_model(make_model("llama"), getattr(peft, kind)(**options))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"vLLM does not serve peft_type=.*; expected LORA"):
        check_adapter(tmp_path, base)


def test_the_list_is_vllms() -> None:
    """Read from vLLM's source: importing it takes longer than all of these tests."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(found.origin).parent / "lora" / "peft_helper.py").read_text()
    helper = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "PEFTHelper"
    )
    read = {
        node.target.id
        for node in helper.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert read >= peft_folder._APPLIED
    refused = {name for name in read - peft_folder._APPLIED if not name.startswith("vllm_")}
    assert not refused & peft_folder._OF_TRAINING
    for init in peft_folder._PLAIN["init_lora_weights"][1:]:
        assert f'"{init}"' in source


@pytest.mark.parametrize("text", ["{", "", "[]", "3", '{"r": 4}', "\x00\xff"])
def test_a_damaged_configuration_is_one_line(text: str, copy: Path, base: Path) -> None:
    (copy / CONFIG).write_text(text, encoding="latin-1")
    for use in (lambda: check_adapter(copy, base), lambda: adapter_config(copy)):
        with pytest.raises(UserError, match=r"adapter_config\.json: (damaged|expected)"):
            use()
    with pytest.raises(UserError, match="does not fit the model"):
        load_adapter(make_model("llama"), copy)


@pytest.mark.parametrize("content", ["cut", "empty", "pointer"])
def test_damaged_weights_are_one_line(content: str, copy: Path, base: Path) -> None:
    whole = (copy / WEIGHTS).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (copy / WEIGHTS).write_bytes({"cut": whole[:500], "empty": b"", "pointer": pointer}[content])
    with pytest.raises(
        UserError, match=r"adapter_model\.safetensors: damaged, cut short, or a git"
    ):
        check_adapter(copy, base)
    with pytest.raises(UserError, match="does not fit the model"):
        load_adapter(make_model("llama"), copy)


def test_weights_that_are_no_whole_lora_are_refused(copy: Path, base: Path) -> None:
    whole = load_file(copy / WEIGHTS)
    first = next(name for name in whole if "lora_A" in name)

    def refused(tensors: dict[str, torch.Tensor], match: str) -> None:
        save_file(tensors, copy / WEIGHTS)
        with pytest.raises(UserError, match=match):
            check_adapter(copy, base)

    refused({}, "holds no tensors")
    refused({n: t for n, t in whole.items() if n != first}, "has no two factors")
    refused(whole | {first: torch.zeros(0)}, "has no two factors")  # as DeepSpeed's ZeRO-3 leaves
    other = {n.replace("model.layers", "language_model.layers"): t for n, t in whole.items()}
    refused(other, r"has no model\.language_model\.layers")  # vLLM would serve the base
    name = "base_model.model.model.embed_tokens.weight"  # resized, and left out by vLLM
    refused(whole | {name: torch.zeros(50, 32)}, "embed_tokens.weight is no factor of a LoRA")
    refused(whole | {first: whole[first][:2].clone()}, "have ranks 2 and 4")
    save_file(whole, copy / WEIGHTS)
    edit(copy, r=8)
    with pytest.raises(UserError, match=r"has rank 4, and adapter_config\.json r=8"):
        check_adapter(copy, base)
    edit(copy, r=0)
    with pytest.raises(UserError, match="expected ranks r of at least 1, found"):
        check_adapter(copy, base)


def test_a_configuration_of_a_newer_peft_is_one_line(copy: Path, base: Path) -> None:
    edit(copy, use_something_new=True)
    with pytest.raises(UserError, match="vLLM does not serve use_something_new=True"):
        check_adapter(copy, base)
