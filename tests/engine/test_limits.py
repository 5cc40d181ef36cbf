"""What vLLM or a method would refuse later is refused by the plan, in one line."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from semalign import zoo
from semalign.config.jobs import EvaluationJob
from semalign.config.read import resolve
from semalign.engine.limits import CPU_HEADS, LORA_RANKS, MERGED, SERVED_MERGED
from semalign.engine.planning import show_plan
from semalign.engine.scoring import show_evaluation_plan
from semalign.errors import UserError

Changed = Callable[..., str]


@pytest.fixture
def changed(tmp_path: Path) -> Changed:
    """A copy of zoo/student whose configuration has other values."""

    def make(**values: object) -> str:
        folder = shutil.copytree(zoo.path("zoo/student"), tmp_path / "student")
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))
        if "head_dim" in values:
            LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
        return str(folder)

    return make


def evaluation(tmp_path: Path, *overrides: str) -> EvaluationJob:
    small = ["tasks=[gsm8k]", "splits=[dev]", f"workdir={tmp_path / 'work'}"]
    return resolve([], [*small, *overrides], EvaluationJob)


@pytest.mark.parametrize(
    ("values", "override", "message"),
    [
        ({"head_dim": 20}, "num_engines=1", "its attention heads have size 20, and vLLM on CPUs"),
        ({}, "tensor_parallel_size=3", "tensor_parallel_size=3: expected a divisor of the 4"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "num_engines=1",
            "is quantised (quantization_config of its config.json: awq)",
        ),
        ({}, "max_model_len=16", "max_model_len: with 16 tokens of prompt and answer not one"),
        ({"max_position_embeddings": 20}, "num_engines=1", "max_model_len: with 20 tokens"),
    ],
)
def test_what_the_engine_cannot_serve_is_refused(
    changed: Changed, tmp_path: Path, values: dict[str, object], override: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        show_evaluation_plan(evaluation(tmp_path, f"model={changed(**values)}", override))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_other_head_sizes_are_a_matter_of_the_device(changed: Changed, tmp_path: Path) -> None:
    show_evaluation_plan(evaluation(tmp_path, f"model={changed(head_dim=20)}", "num_gpus=1"))


def test_a_transfer_looks_at_both_models(changed: Changed, tmp_path: Path) -> None:
    overrides = [f"student={changed(head_dim=20)}", f"workdir={tmp_path / 'work'}"]
    with pytest.raises(UserError, match="its attention heads have size 20"):
        show_plan(resolve([], overrides))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("seeking", "seeking.layers=6: the student has 6 layers and the teacher 4"),
        ("laten", "laten.layers: 6 layers are to be located in both models, the teacher has 1..4"),
    ],
)
def test_a_teacher_smaller_than_the_student(tmp_path: Path, method: str, message: str) -> None:
    swapped = ["teacher=zoo/student", "student=zoo/teacher", f"method={method}"]
    with pytest.raises(UserError) as error:
        show_plan(resolve([], [*swapped, f"workdir={tmp_path / 'work'}"]))
    assert message in str(error.value)


def test_matrices_that_do_not_fit(tmp_path: Path) -> None:
    swapped = ["teacher=zoo/student", "student=zoo/teacher", "method=seeking", "seeking.layers=2"]
    with pytest.raises(UserError, match="expected a teacher that is at least as large"):
        show_plan(resolve([], [*swapped, f"workdir={tmp_path / 'work'}"]))


def test_an_evaluation_is_planned_with_memory_and_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_evaluation_plan(evaluation(tmp_path, "model=zoo/student"))
    printed = capsys.readouterr().out
    assert "student, gsm8k dev: 200 items x 1 samples, ~" in printed
    assert "2.48 GB of memory" in printed and "times are estimates" in printed


def test_the_limits_are_those_of_vllm() -> None:
    """Read in its source: importing it takes half a minute."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    package = Path(found.origin).parent
    backend = ast.parse((package / "v1/attention/backends/cpu_attn.py").read_text())
    [sizes] = [
        ast.literal_eval(node.body[-1].value)  # type: ignore[attr-defined]
        for node in ast.walk(backend)
        if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes"
    ]
    assert tuple(sizes) == CPU_HEADS
    line = next(
        line
        for line in (package / "config/lora.py").read_text().splitlines()
        if line.startswith("MaxLoRARanks")
    )
    assert set(LORA_RANKS) <= set(ast.literal_eval(line.partition("Literal")[2]))
    for kind in (*SERVED_MERGED, "glm4"):
        tree = ast.parse((package / f"model_executor/models/{kind}.py").read_text())
        [parts] = [
            ast.literal_eval(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and ast.unparse(node.targets) == "packed_modules_mapping"
        ]
        assert [parts[name] == [name] for name in MERGED] == [kind in SERVED_MERGED] * len(MERGED)
