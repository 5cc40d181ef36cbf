"""evaluate.py as a job: its MLflow run, its comparison, and one clear line for each bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from semalign import cli
from semalign.artifacts.records import read_records
from semalign.config.jobs import EvaluationJob
from semalign.config.read import resolve
from semalign.engine.scoring import checked_candidates, evaluation_key, run_evaluation
from semalign.engine.serving import Engines
from semalign.models.adapters import lora_on_layers, save_adapter
from semalign.models.loading import load_model
from semalign.names import record_name
from semalign.report.table import SHARES
from semalign.zoo import path as zoo_path

ITEMS = 12

Complain = Callable[..., str]


SUBJECTS = ("Business & Law", "C++", "C##", "what's new?", "x" * 300, "low", "a/b")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first items of the zoo's dev splits."""
    root = tmp_path_factory.mktemp("data")
    for task in ("mmlu", "gsm8k", "humaneval", "mbpp"):
        lines = (zoo_path("zoo/data") / task / "dev.jsonl").read_text().splitlines()[:ITEMS]
        if task == "mmlu":  # as users name them
            rows = [json.loads(line) for line in lines]
            for row, subject in zip(rows, SUBJECTS, strict=False):
                row["subject"] = subject
            lines = [json.dumps(row) for row in rows]
        (root / task).mkdir()
        (root / task / "dev.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    save_adapter(lora_on_layers(load_model("zoo/student"), [1], rank=4), folder, "zoo/student")
    return folder


@pytest.fixture
def complain(data: Path, tmp_path: Path, capsys: Any) -> Complain:
    """Run evaluate.py's main with overrides; the one line it prints."""

    def run(*overrides: str) -> str:
        work = tmp_path / "work"
        given = [f"root={data}", "splits=[dev]", f"workdir={work}", *overrides]
        status = cli.main(["evaluate", *given])
        error = capsys.readouterr().err
        assert status == 2 and "Traceback" not in error
        assert not work.exists()
        [line] = [text for text in error.splitlines() if "error" in text]
        return line

    return run


def test_unknown_names(complain: Complain) -> None:
    line = complain("protocol=papre")
    assert line == "error: protocol 'papre' is unknown; did you mean 'paper'?"
    assert "did you mean 'mbpp'?" in complain("tasks=[mbp]")
    assert complain("modle=x") == "error: modle: unknown key; did you mean 'model'?"
    line = complain("sampling.samples=3")
    assert line.startswith("error: sampling.samples: unknown key; expected one of")
    assert "'lm-eval' has no profile for humaneval" in complain("protocol=lm-eval")
    assert "no split 'tset'" in complain("splits=[tset]")
    assert "model folder '/nowhere' does not exist" in complain("model=/nowhere")


def test_more_successes_than_samples(complain: Complain) -> None:
    line = complain("sampling.n=1", "sampling.k=5")
    assert "pass@5 needs at least k=5 samples, found n=1" in line
    assert "n=2 samples at temperature 0 are all the same" in complain(
        "sampling.n=2", "sampling.temperature=0"
    )


def test_a_tokenizer_without_a_chat_template(complain: Complain) -> None:
    line = complain("protocol=paper-chat")
    assert "has no chat template, which this protocol wants; choose one without" in line


def test_an_adapter_of_another_base(complain: Complain, adapter: Path, tmp_path: Path) -> None:
    line = complain("model=zoo/teacher", f"adapter={adapter}")
    assert "is for another size than zoo/teacher's" in line and "one of zoo/student" in line
    model = load_model("zoo/student")
    for weight in model.parameters():
        weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "twin")
    for file in zoo_path("zoo/student").glob("tokenizer*"):
        (tmp_path / "twin" / file.name).write_bytes(file.read_bytes())
    line = complain(f"model={tmp_path / 'twin'}", f"adapter={adapter}")
    assert line.endswith(f"made for zoo/student, whose weights {tmp_path / 'twin'} has not")
    assert "no adapter_config.json" in complain(f"adapter={tmp_path}")


def test_wrong_files_and_rows(complain: Complain, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "rows"
    (root / "mmlu").mkdir(parents=True)
    file = root / "mmlu" / "dev.jsonl"
    file.write_bytes((data / "gsm8k" / "dev.jsonl").read_bytes())
    line = complain(f"root={root}", "tasks=[mmlu]")
    assert f"{file}:1: field 'subject' is missing; mmlu needs question, subject" in line
    rows = [json.loads(line) for line in (data / "mmlu" / "dev.jsonl").read_text().splitlines()]
    del rows[3]["answer"]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert f"{file}:4: field 'answer' is missing" in complain(f"root={root}", "tasks=[mmlu]")
    assert "no such folder" in complain(f"root={tmp_path / 'nowhere'}")
    row = json.loads((data / "humaneval" / "dev.jsonl").read_text().partition("\n")[0])
    row["test"] = f"import numpy\n{row['test']}"
    (root / "humaneval").mkdir()
    (root / "humaneval" / "dev.jsonl").write_text(json.dumps(row))
    line = complain(f"root={root}", "tasks=[humaneval]")
    assert "the reference answers of 1 of 1 rows fail their own tests" in line
    assert f"{row['task_id']}: ModuleNotFoundError: No module named 'numpy'" in line


def test_one_job_leaves_scores_intervals_and_items_in_mlflow(
    engines: Engines, data: Path, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    job = resolve(
        [],
        [
            f"root={data}",
            "splits=[dev]",
            f"workdir={tmp_path}/my runs, 50%?",
            f"adapter={adapter}",
            "baseline=true",
            "tasks=[mmlu,humaneval]",
            "sampling.n=3",
            "sampling.k=2",
        ],
        EvaluationJob,
    )
    scored = run_evaluation(job, engines=engines)
    assert scored.generated == 4 * ITEMS
    code = scored.records["lora", "humaneval", "dev"]
    assert [(r.id, r.sample) for r in code[:3]] == [(code[0].id, sample) for sample in range(3)]
    assert {r.tier for r in code} == {1} or {r.tier for r in code} == {2}
    printed = capsys.readouterr().out
    assert "protocol paper+n3t0.1p0.95k2-2" in printed
    assert "mmlu dev, student -> lora: +0.0 points" in printed  # a new LoRA changes nothing
    assert SHARES in printed
    [report] = (job.work / "reports").iterdir()
    assert SHARES.capitalize() in report.read_text()
    client = MlflowClient(tracking_uri=job.tracking_uri)
    [run] = client.search_runs([client.get_experiment_by_name("semalign").experiment_id])
    score = scored.scores["student", "mmlu", "dev"]
    found = run.data.metrics
    assert found["dev/mmlu/student"] == score.value
    for end in ("stderr", "low", "high"):
        assert found[f"dev/mmlu/student.{end}"] == getattr(score, end)
    key = ("lora", "humaneval", "dev")
    manifest = json.loads((scored.files[key].parent / "manifest.json").read_text())
    assert scored.shares[key]["cut_prompts"] == 0
    for name, share in scored.shares[key].items():
        assert found[f"dev/humaneval/lora.{name}"] == manifest[name] == share
    subjects = {record.group for record in scored.records["student", "mmlu", "dev"]}
    names = [record_name(subject, taken=("low", "high", "stderr")) for subject in subjects]
    assert {f"dev/mmlu/student.{name}" for name in names} <= set(found)
    assert set(SUBJECTS) <= subjects and len(set(names)) == len(subjects)
    assert found["dev/mmlu/student.low"] == score.low
    assert run.data.tags["protocol.hash"] == scored.protocol.hash
    table = client.download_artifacts(run.info.run_id, "predictions.json", str(tmp_path))
    assert len(json.loads(Path(table).read_text())["data"]) == 2 * ITEMS + 2 * 3 * ITEMS
    again = run_evaluation(job, engines=engines)
    assert again.generated == 0 and again.records == scored.records
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_a_killed_job_goes_on_with_the_missing_items(
    data: Path, tmp_path: Path, engines: Engines
) -> None:
    """Kill -9 the whole process group once some batches are judged; a rerun answers the rest."""
    given = [f"root={data}", "splits=[dev]", "tasks=[gsm8k]", "batch_items=2"]
    command = [sys.executable, "ray_jobs/evaluate.py", *given]
    killed = subprocess.Popen(
        [*command, f"workdir={tmp_path / 'killed'}"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    parts: list[Path] = []
    while len(parts) < 2:
        assert time.monotonic() < deadline and killed.poll() is None
        parts = list((tmp_path / "killed").glob("records/gsm8k-dev-*/records.parts/[0-9]*.parquet"))
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    there = sum(len(read_records(part)) for part in parts)
    assert 0 < there < ITEMS
    jobs = [
        resolve([], [*given, f"workdir={tmp_path / name}"], EvaluationJob)
        for name in ("killed", "undisturbed")
    ]
    resumed, undisturbed = (run_evaluation(job, engines=engines) for job in jobs)
    assert undisturbed.generated == ITEMS and resumed.generated <= ITEMS - there
    key = ("student", "gsm8k", "dev")
    assert resumed.scores == undisturbed.scores
    assert [r.tokens for r in resumed.records[key]] == [r.tokens for r in undisturbed.records[key]]
    assert len({r.id for r in resumed.records[key]}) == ITEMS


def test_another_chat_template_is_another_run(data: Path, tmp_path: Path) -> None:
    """Its prompts differ, so a finished run of the other one in MLflow does not count."""
    shutil.copytree(zoo_path("zoo/student"), tmp_path / "model")

    def key(template: str) -> str:
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
        given = [f"model={tmp_path / 'model'}", f"root={data}", "tasks=[mmlu]", "splits=[dev]"]
        given += ["protocol=paper-chat", f"workdir={tmp_path / 'work'}"]
        job = resolve([], given, EvaluationJob)
        return evaluation_key(job, checked_candidates(job))

    question = "{{ messages[0].content }}"
    assert key(question) == key(question) != key(f"{question}!")
