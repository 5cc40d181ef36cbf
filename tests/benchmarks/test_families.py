"""Every family of `benchmarks/families.py`, up to the merged checkpoint: without vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.families import FAMILIES, ON_GPUS, REFUSED, refusal, transferred
from semalign.models.adapters import load_adapter
from semalign.models.loading import load_model


@pytest.mark.parametrize("name", [*FAMILIES, *ON_GPUS])
def test_a_family_is_attributed_extracted_trained_and_merged(name: str, tmp_path: Path) -> None:
    student, adapter, merged = transferred({**FAMILIES, **ON_GPUS}[name], tmp_path)
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        plain = load_model(student)(input_ids=ids).logits
        adapted = load_adapter(load_model(student), adapter)(input_ids=ids).logits
        whole = load_model(merged)(input_ids=ids).logits
    torch.testing.assert_close(whole, adapted, atol=1e-3, rtol=1e-3)
    assert (adapted - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_refused_is_refused_by_the_plan_in_one_line(name: str) -> None:
    line = refusal(REFUSED[name])
    assert line.startswith(("model '", "training.lora.target_modules: ")) and "\n" not in line
