"""The shipped weights load, have the promised shapes, and are small; the README is up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from semalign import zoo
from semalign.errors import UserError
from semalign.tasks import load_split
from semalign.zoo.recipe import table
from semalign.zoo.scoring import right_answers

ROOT = Path(zoo.__file__).parent
RESULTS = json.loads((ROOT / "results.json").read_text())


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_model_loads_in_bfloat16_and_computes(name: str) -> None:
    folder = zoo.path(f"zoo/{name}")
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    assert not model.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    logits = model(**tokenizer("Question:", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


def test_width_and_depth_differ_and_the_depth_ratio_is_no_integer() -> None:
    teacher, student = (AutoConfig.from_pretrained(zoo.path(f"zoo/{n}")) for n in zoo.MODELS[:2])
    assert teacher.hidden_size != student.hidden_size
    assert teacher.num_hidden_layers % student.num_hidden_layers
    assert student.num_key_value_heads < student.num_attention_heads


def test_the_code_teacher_has_one_more_row_in_both_embeddings() -> None:
    teacher, code = (
        AutoConfig.from_pretrained(zoo.path(f"zoo/{n}")) for n in ("teacher", "code-teacher")
    )
    assert code.vocab_size == teacher.vocab_size + 1


def test_the_three_folders_are_at_most_15_megabytes() -> None:
    files = [f for name in zoo.MODELS for f in zoo.path(f"zoo/{name}").rglob("*")]
    assert sum(f.stat().st_size for f in files) <= 15e6


def test_an_unknown_name_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="zoo/teacher") as caught:
        zoo.path("zoo/techer")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["mmlu", "gsm8k"])
def test_the_teacher_scores_on_some_rows_as_recorded(task: str) -> None:
    """Within four standard errors of the recorded score, on the first 50 dev rows."""
    folder = zoo.path("zoo/teacher")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = load_split(zoo.path("zoo/data"), task, "dev")[:50]
    right = right_answers(model, AutoTokenizer.from_pretrained(folder), rows)
    recorded = RESULTS["teacher"]["dev"][task]["value"]
    error = (recorded * (1 - recorded) / len(rows)) ** 0.5
    assert abs(sum(right) / len(rows) - recorded) <= 4 * error


def test_the_teacher_is_15_points_above_the_student_on_every_task_and_nobody_is_perfect() -> None:
    teacher, student = RESULTS["teacher"]["test"], RESULTS["student"]["test"]
    for task, ours in teacher.items():
        assert ours["n"] == student[task]["n"] == 400
        assert ours["value"] - student[task]["value"] >= 0.15, task
        assert ours["value"] <= 0.97


def test_the_readme_shows_the_recorded_scores() -> None:
    assert table(RESULTS) in (ROOT / "README.md").read_text()
