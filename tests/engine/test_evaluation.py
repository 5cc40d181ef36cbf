"""Real engines on a real Ray: the same tokens as transformers, adapters apart, deaths survived."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from semalign.artifacts.artifact import Workspace
from semalign.config.sections import Evaluation
from semalign.engine.cpu_lora import _choose, _expand, _expand_slice, _shrink
from semalign.engine.evaluation import Scored, score_all
from semalign.errors import UserError
from semalign.models.loading import load_tokenizer
from semalign.models.reference import Model
from semalign.stages.judged import Candidate
from semalign.tasks import load_split
from semalign.zoo import path as zoo_path

TASKS = ("mmlu", "gsm8k", "mbpp")
SETTINGS = Evaluation(
    tasks=TASKS, splits=("test",), max_model_len=128, kv_cache_gb=0.25, batch_items=4
)
ITEMS = 9


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random Llamas with heads of 32, the narrowest that vLLM has CPU attention for."""
    tokenizer = load_tokenizer("zoo/student")
    folders = {}
    for seed, (name, layers, heads) in enumerate([("teacher", 3, 4), ("student", 2, 2)]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32 * heads,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            eos_token_id=tokenizer.eos_token_id,
        )
        folders[name] = tmp_path_factory.mktemp("family") / name
        LlamaForCausalLM(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first items of the zoo's test splits."""
    root = tmp_path_factory.mktemp("data")
    for task in TASKS:
        lines = (zoo_path("zoo/data") / task / "test.jsonl").read_text().splitlines()[:ITEMS]
        (root / task).mkdir()
        (root / task / "test.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def adapters(family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs on layer 1 of the student, large enough to change its answers."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        student = AutoModelForCausalLM.from_pretrained(family["student"], dtype=torch.float32)
        targets = ["up_proj", "down_proj", "v_proj", "o_proj"]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, layers_to_transform=[1])
        model = get_peft_model(student, config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=1.0)
        folders.append(tmp_path_factory.mktemp("adapters") / str(seed))
        model.save_pretrained(folders[-1])
    return folders


def opened(folder: Path) -> Model:
    return Model.open(str(folder), dtype="float32")


def candidates(family: dict[str, Path], adapters: list[Path]) -> list[Candidate]:
    student, teacher = (opened(family[name]) for name in ("student", "teacher"))
    return [
        Candidate(name="student", model=student),
        Candidate(name="first", model=student, adapter=str(adapters[0])),
        Candidate(name="teacher", model=teacher),
        Candidate(name="second", model=student, adapter=str(adapters[1])),
    ]


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None,
    family: dict[str, Path],
    adapters: list[Path],
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Scored, Path]:
    folder = tmp_path_factory.mktemp("records")
    return run(candidates(family, adapters), data, folder), folder


def run(models: list[Candidate], data: Path, folder: Path, **changes: Any) -> Scored:
    settings = SETTINGS.model_copy(update=changes)
    return score_all(models, settings, root=data, workspace=Workspace(folder))


def test_same_tokens_and_letters_as_transformers_and_peft(
    undisturbed: tuple[Scored, Path],
    family: dict[str, Path],
    adapters: list[Path],
    data: Path,
) -> None:
    records = undisturbed[0].records
    for candidate in candidates(family, adapters):
        path = candidate.model.path
        tokenizer = load_tokenizer(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        if candidate.adapter:
            model = PeftModel.from_pretrained(model, candidate.adapter)
        for example, record in zip(
            load_split(data, "mmlu", "test"), records[candidate.name, "mmlu", "test"], strict=True
        ):
            ids = tokenizer([example.prompt], return_tensors="pt")["input_ids"]
            letters = [tokenizer(f"Answer: {letter}")["input_ids"][-1] for letter in "ABCD"]
            best = model(ids).logits[0, -1, letters].argmax()
            assert record.extracted == "ABCD"[best]
        for example, record in zip(
            load_split(data, "gsm8k", "test"), records[candidate.name, "gsm8k", "test"], strict=True
        ):
            ids = tokenizer([example.prompt], return_tensors="pt")["input_ids"]
            # Random weights never stop: as many tokens as the engine had room for.
            out = model.generate(input_ids=ids, max_length=SETTINGS.max_model_len, do_sample=False)
            assert record.tokens == out[0, ids.shape[1] :].tolist()
            assert record.id == example.id


def test_adapters_differ_and_items_are_all_there_once(
    undisturbed: tuple[Scored, Path], family: dict[str, Path], adapters: list[Path]
) -> None:
    evaluation = undisturbed[0]
    answers = {
        name: [record.tokens for record in evaluation.records[name, "gsm8k", "test"]]
        for name in ("student", "first", "second")
    }
    assert answers["student"] != answers["first"] != answers["second"] != answers["student"]
    assert evaluation.generated == len(candidates(family, adapters)) * len(TASKS) * ITEMS
    for key, rows in evaluation.records.items():
        assert len({record.id for record in rows}) == len(rows) == ITEMS
        assert evaluation.scores[key].n == ITEMS
        assert evaluation.files[key].is_file()


def test_a_second_run_reads_what_is_there(
    undisturbed: tuple[Scored, Path], family: dict[str, Path], adapters: list[Path], data: Path
) -> None:
    evaluation, folder = undisturbed
    again = run(candidates(family, adapters), data, folder)
    assert again.generated == 0
    assert again.records == evaluation.records
    one = evaluation.files["teacher", "gsm8k", "test"]
    one.unlink()
    repaired = run(candidates(family, adapters), data, folder)
    assert repaired.generated == ITEMS
    assert stable(repaired) == stable(evaluation)


def test_killed_engines_and_judges_are_replaced(
    undisturbed: tuple[Scored, Path],
    family: dict[str, Path],
    adapters: list[Path],
    data: Path,
    tmp_path: Path,
) -> None:
    killed: dict[str, int] = {}
    stop = threading.Event()
    thread = threading.Thread(target=kill_first, args=(("Engine.generate", "_judge"), killed, stop))
    thread.start()
    disturbed = run(candidates(family, adapters), data, tmp_path)
    stop.set()
    thread.join()
    assert set(killed) == {"Engine.generate", "_judge"}
    assert stable(disturbed) == stable(undisturbed[0])


def kill_first(names: tuple[str, ...], killed: dict[str, int], stop: threading.Event) -> None:
    """Kill -9 the first process of this session's Ray seen at each of these tasks."""
    while not stop.is_set() and len(killed) < len(names):
        for process in psutil.Process().children(recursive=True):
            try:
                title = process.cmdline()[0]
            except (psutil.Error, IndexError):
                continue
            for name in names:
                if name not in killed and title == f"ray::{name}":
                    os.kill(process.pid, signal.SIGKILL)
                    killed[name] = process.pid
        time.sleep(0.01)


def stable(evaluation: Scored) -> dict[Any, Any]:
    """The records without the time they took and the sandbox's wording."""
    return {
        key: [(r.id, r.sample, r.output, r.tokens, r.extracted, r.correct) for r in rows]
        for key, rows in evaluation.records.items()
    }


def test_bad_input_is_refused_before_any_engine(
    family: dict[str, Path], adapters: list[Path], data: Path, tmp_path: Path
) -> None:
    student = Candidate(name="student", model=opened(family["student"]))
    with pytest.raises(UserError, match=r"no split 'tset'; did you mean 'test'\?"):
        run([student], data, tmp_path, splits=("tset",))
    with pytest.raises(UserError, match="task 'mbp' is unknown"):
        run([student], data, tmp_path, tasks=("mbp",))
    with pytest.raises(UserError, match=r"nowhere: no adapter_config.json"):
        run([Candidate(name="x", model=student.model, adapter="nowhere")], data, tmp_path)
    config = json.loads((adapters[0] / "adapter_config.json").read_text()) | {"use_dora": True}
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((adapters[0] / file).read_bytes())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="vLLM does not serve use_dora=True"):
        run([Candidate(name="x", model=student.model, adapter=str(tmp_path))], data, tmp_path)


@pytest.mark.parametrize("slots", [[1, 1, 1, 1], [0, 1, 1, 0]])
def test_dense_lora_kernels_are_the_gather_kernels(slots: list[int]) -> None:
    torch.manual_seed(0)
    x, a, b = torch.randn(4, 6), torch.randn(2, 1, 3, 6), torch.randn(2, 1, 5, 3)
    calls = []

    def gather(inputs: Any, weights: Any, output: Any, slots: Any, *args: Any) -> None:
        calls.append(args)

    index = torch.tensor(slots)
    low, out, part = torch.zeros(4, 3), torch.ones(4, 5), torch.ones(4, 9)
    _choose(_shrink, gather)(x, a, low, index, 0.5)
    _choose(_expand, gather)(low, b, out, index, True)
    _choose(_expand_slice, gather)(low, b, part, index, 2, 5, True)
    if len(set(slots)) > 1:
        assert calls == [(0.5,), (True,), (2, 5, True)]
        return
    for row, slot in enumerate(slots):
        lowered = 0.5 * a[slot, 0] @ x[row]
        raised = 1 + b[slot, 0] @ lowered
        torch.testing.assert_close(low[row], lowered)
        torch.testing.assert_close(out[row], raised)
        torch.testing.assert_close(part[row], torch.cat([torch.ones(2), raised, torch.ones(2)]))
