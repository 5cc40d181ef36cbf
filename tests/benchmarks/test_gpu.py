"""`benchmarks/gpu.py` at tiny shapes on the CPU: every stage, and the operations that it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from semalign.models.decoder import find_decoder, run_base

# attention's share is small, for the counter leaves out that of a CPU
SHORT = gpu.setting_of(gpu.options(["--model", "tiny", "--device", "cpu", "--length", "8"]))


def test_the_stages_give_numbers_and_one_that_fails_takes_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "numbers.json"
    stages = "waits,peak,bases,map,extraction,losses,training"
    tiny = ["--model", "tiny", "--device", "cpu", "--layers", "2", "--length", "16"]
    gpu.main([*tiny, "--stages", stages, "--json", str(file)])
    printed, written = capsys.readouterr().out, json.loads(file.read_text())
    [failed] = [line for line in printed.splitlines() if "failed" in line]
    assert failed.startswith("waits failed") and failed.endswith("only a GPU is waited for")
    found = written["stages"]
    assert (
        list(found)
        == stages.split(",")[1:]
        == [line.split()[1] for line in printed.splitlines() if line.startswith("##")]
    )
    assert {row["micro-batch"] for row in found["training"]} == {1, 2, 4}
    assert all(row["tokens/s"] > 0 and row["MFU, %"] > 0 for row in found["training"])
    assert all(row["1 - cosine, worst"] < 1e-9 for row in found["bases"][:2])
    assert found["map"][-1]["value"] < 1e-9


def test_the_operations_of_a_forward_pass_are_those_that_are_made() -> None:
    tokens = gpu.examples(SHORT, 2, mixed=False)
    model = gpu.built(SHORT.student, SHORT.device, layers=3)
    ids = torch.tensor([example.ids for example in tokens])
    with FlopCounterMode(display=False) as counter:
        run_base(find_decoder(model), ids, torch.ones_like(ids))
    counted = gpu.forward_operations(SHORT.student, 3, tokens)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_operations_of_a_training_step_are_those_that_are_made() -> None:
    tokens = gpu.examples(SHORT, 2, mixed=False)
    student = gpu.supervised(SHORT, gpu.adapted(SHORT), tokens)
    adapter = gpu.planned_update(SHORT, tokens, 2).trained_parameters
    with FlopCounterMode(display=False) as counter:
        sums = student([0, 1])
        (sums["alignment"] + sums["cross_entropy"]).backward()
    counted = gpu.training_operations(SHORT, tokens, adapter)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)
