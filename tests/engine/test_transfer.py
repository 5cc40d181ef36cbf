"""A whole transfer on the shipped family: what it leaves, what a second run skips, what serves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from semalign import zoo
from semalign.artifacts.records import Record, read_records
from semalign.config.jobs import Config
from semalign.config.read import resolve
from semalign.engine.scoring import score_candidates
from semalign.engine.serving import Engines
from semalign.engine.transfer import FinishedTransfer, run_transfer
from semalign.files import sha256
from semalign.models.adapters import merge_adapter
from semalign.models.loading import load_model, load_tokenizer
from semalign.models.reference import Model
from semalign.stages.judged import Candidate
from semalign.tasks import load_split

TASKS = ("mmlu", "gsm8k", "humaneval", "mbpp")
LINES = {"train": 64, "extract": 8, "dev": 12, "test": 16}
BASE = (
    *("data.task=gsm8k", "evaluation.splits=[dev,test]"),
    *("training.epochs=2", "training.batch_size=16", "training.lr=3e-3"),
)
KINDS = ("attributions", "activations", "bases", "maps", "transfers", "records")


@dataclass
class Run:
    config: Config
    outcome: FinishedTransfer
    printed: str
    files: set[str]  # that it left in the work folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the shipped splits."""
    root = tmp_path_factory.mktemp("data")
    for task in TASKS:
        (root / task).mkdir()
        for split, count in LINES.items():
            rows = (zoo.path("zoo/data") / task / f"{split}.jsonl").read_text().splitlines()
            (root / task / f"{split}.jsonl").write_text("\n".join(rows[:count]) + "\n")
    return root


@pytest.fixture(scope="module")
def make(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    work = tmp_path_factory.mktemp("transfer")

    def configure(*overrides: str) -> Config:
        places = [f"data.root={data}", f"workdir={work / 'work'}"]
        return resolve([], [*BASE, *places, *overrides])

    return configure


@pytest.fixture(scope="module")
def run(engines: Engines, make: Callable[..., Config]) -> Run:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        outcome = run_transfer(make(), engines=engines)
    return Run(make(), outcome, out.getvalue(), made_files(make().work))


def made_files(work: Path) -> set[str]:
    """Every artifact's files, below the work folder."""
    return {
        str(file.relative_to(work))
        for kind in KINDS
        for file in (work / kind).rglob("*")
        if file.is_file() and not file.name.endswith(".lock")
    }


def client(config: Config) -> MlflowClient:
    return MlflowClient(tracking_uri=config.tracking_uri)


def test_the_table_has_three_rows_and_four_tasks(run: Run) -> None:
    for word in ("student", "teacher", "transferred", "gsm8k* n=16", "mean gap", "mlflow ui"):
        assert word in run.printed
    for stage in ("attribute", "pair", "extract", "prefix", "align", "train", "evaluate", "record"):
        assert f"[{stage}] " in run.printed


def test_every_score_has_its_items_and_interval(run: Run) -> None:
    scores = run.outcome.scored.scores
    assert set(scores) == {
        (name, task, split)
        for name in ("student", "teacher", "transferred")
        for task in TASKS
        for split in ("dev", "test")
    }
    for (_, _, split), found in scores.items():
        assert found.n == LINES[split]
        assert found.low <= found.value <= found.high


def test_mlflow_holds_the_run(run: Run, tmp_path: Path) -> None:
    mlflow = client(run.config)
    found = mlflow.get_run(run.outcome.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["loss.alpha"] == str(run.config.loss.alpha)
    assert found.data.params["training.lora.rank"] == "16"
    steps = mlflow.get_metric_history(run.outcome.run_id, "train/alignment_cosine")
    assert [point.step for point in steps] == list(range(1, 2 * 4 + 1))
    assert len(mlflow.get_metric_history(run.outcome.run_id, "epoch/loss")) == 2
    assert found.data.metrics["test/gsm8k/transferred"] == pytest.approx(
        run.outcome.scored.scores["transferred", "gsm8k", "test"].value
    )
    assert {entry.dataset.name for entry in found.inputs.dataset_inputs} == {
        "gsm8k/train",
        "gsm8k/extract",
    }
    artifacts = {a.path for a in mlflow.list_artifacts(run.outcome.run_id)}
    assert artifacts == {"adapter", "figures", "predictions.json", "report.md"}
    figures = {a.path for a in mlflow.list_artifacts(run.outcome.run_id, "figures")}
    assert figures == {f"figures/{name}.png" for name in ("attribution", "loss", "pairing")}
    table = mlflow.download_artifacts(run.outcome.run_id, "predictions.json", str(tmp_path))
    assert len(json.loads(Path(table).read_text())["data"]) == 3 * 4 * (12 + 16)


def test_a_second_run_does_nothing_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_transfer(run.config)
    printed = capsys.readouterr().out
    assert outcome.run_id == run.outcome.run_id
    stages = [line.partition("]")[0][1:] for line in printed.splitlines() if "cached" in line]
    assert stages == ["attribute", "extract", "prefix", "bases", "bases", "align", "train"]
    assert "[evaluate]" in printed and "0 items generated" in printed
    assert len(client(run.config).search_runs(["1"])) == 1
    assert len(client(run.config).get_metric_history(outcome.run_id, "train/loss")) == 8


LOCAL = """
import sys
sys.modules["ray"] = None  # what imports it ends with an error
from semalign.config.read import resolve
from semalign.engine.transfer import run_transfer
outcome = run_transfer(resolve([], sys.argv[1:]), local=True)
print(outcome.folder.name, outcome.run_id)
"""


def test_without_ray_it_leaves_the_same_files(
    run: Run, make: Callable[..., Config], tmp_path: Path
) -> None:
    """In a process that cannot import Ray, scored on one task and split of the same transfer."""
    work = tmp_path / "work"
    overrides = [
        *BASE,
        f"data.root={run.config.data.root}",
        f"workdir={work}",
        "evaluation.tasks=[gsm8k]",
        "evaluation.splits=[dev]",
    ]
    done = subprocess.run(
        [sys.executable, "-c", LOCAL, *overrides], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder, run_id = done.stdout.split()[-2:]
    assert folder == run.outcome.folder.name
    found = made_files(work)
    reported = {"report.md", *(f"figures/{name}.png" for name in ("attribution", "pairing"))}
    assert all((work / "transfers" / folder / name).is_file() for name in reported)
    others = ("records/", "references/")  # of other tasks and splits, and of tasks with code
    scored = {
        f for f in run.files if not f.startswith(others) or f.startswith("records/gsm8k-dev-")
    }
    assert found == scored
    for name in sorted(f for f in found if f.endswith(".safetensors")):
        assert sha256(work / name) == sha256(run.config.work / name), name
    for name in sorted(f for f in found if f.endswith("/history.json")):
        assert (work / name).read_text() == (run.config.work / name).read_text()
    answered = [f for f in found if f.endswith(".parquet")]
    assert len(answered) == 3
    for name in answered:
        assert timeless(work / name) == timeless(run.config.work / name)
    [logged] = MlflowClient(tracking_uri=f"sqlite:///{work / 'mlflow.db'}").search_runs(["1"])
    assert logged.info.run_id == run_id and logged.info.status == "FINISHED"
    here = client(run.config).get_run(run.outcome.run_id).data
    assert logged.data.tags["adapter.sha256"] == here.tags["adapter.sha256"]
    for name in ("train/loss", "epoch/loss", "dev/gsm8k/transferred"):
        assert logged.data.metrics[name] == here.metrics[name]


def timeless(file: Path) -> list[Record]:
    """The records of a file without how long judging took."""
    return [replace(record, seconds=0.0) for record in read_records(file)]


def test_one_more_layer_is_extracted_alone(
    run: Run,
    engines: Engines,
    make: Callable[..., Config],
    capsys: pytest.CaptureFixture[str],
) -> None:
    [store] = (run.config.work / "activations").glob("teacher-*")
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*.safetensors")}
    run_transfer(make("extraction.layers=[2]"), engines=engines)
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("[extract]")]
    assert "layers (counted from 1): mlp 1, mlp 2;" in line and "cached" not in line
    after = {file: file.stat().st_mtime_ns for file in store.rglob("*.safetensors")}
    assert {file: after[file] for file in before} == before
    assert {file.parent.name for file in set(after) - set(before)} == {"mlp.1"}  # from 0


def test_plain_peft_and_a_merged_model_say_the_same(run: Run, tmp_path: Path) -> None:
    """Greedy tokens as recorded, of transformers + peft, and of the merged checkpoint."""
    from peft import PeftModel

    adapter = run.outcome.folder / "adapter"
    records = run.outcome.scored.records["transferred", "gsm8k", "test"]
    model = PeftModel.from_pretrained(load_model("zoo/student", dtype="float32"), str(adapter))
    tokenizer = load_tokenizer("zoo/student")
    for example, record in zip(
        load_split(Path(run.config.data.root), "gsm8k", "test"), records, strict=True
    ):
        assert example.id == record.id
        prompt = tokenizer(example.prompt, return_tensors="pt")
        with torch.no_grad():
            whole = model.generate(**prompt, do_sample=False, max_new_tokens=len(record.tokens))
        assert whole[0, prompt["input_ids"].shape[1] :].tolist() == record.tokens

    merge_adapter("zoo/student", adapter, tmp_path / "merged")
    settings = run.config.evaluation.model_copy(update={"tasks": ("gsm8k",)})
    config = run.config.model_copy(update={"evaluation": settings})
    model = Model.open(str(tmp_path / "merged"), dtype=config.dtype)
    merged = score_candidates(config, [Candidate(name="student", model=model)]).records[
        "student", "gsm8k", "test"
    ]
    assert [record.tokens for record in merged] == [record.tokens for record in records]


def test_a_teacher_with_one_more_token(
    run: Run, make: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make("teacher=zoo/code-teacher", "data.task=mbpp", "evaluation.tasks=[mbpp]")
    run_transfer(config)
    assert "vocabulary overlap 100.00% of the student's" in capsys.readouterr().out


def test_a_whole_layer_becomes_a_checkpoint(
    run: Run, engines: Engines, make: Callable[..., Config]
) -> None:
    config = make("training.adapter=full", "evaluation.tasks=[gsm8k]", "evaluation.splits=[dev]")
    outcome = run_transfer(config, engines=engines)
    changed = load_file(outcome.folder / "student" / "model.safetensors")
    before = load_model("zoo/student", dtype="float32").state_dict()
    different = {name for name in before if not torch.equal(before[name], changed[name].float())}
    assert different and len({name.split(".")[2] for name in different}) == 1
    assert ("transferred", "gsm8k", "dev") in outcome.scored.scores


def test_nothing_is_left_in_the_working_directory(run: Run) -> None:
    assert not Path("mlruns").exists() and not Path("mlflow.db").exists()
    assert Path(run.config.workdir).is_absolute()
