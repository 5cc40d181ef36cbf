"""What the key of a run and of records holds: rows by content, and how a model is served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semalign import zoo
from semalign.config.read import resolve
from semalign.methods.method import Transfer
from semalign.models.reference import Model
from semalign.stages.judged import Candidate, Records
from semalign.tasks import load_split
from semalign.tasks.protocols import find_protocol

TASK = "gsm8k"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The first rows of each split."""
    root = tmp_path / "data"
    (root / TASK).mkdir(parents=True)
    for split in ("train", "extract", "dev", "test"):
        rows = (zoo.path("zoo/data") / TASK / f"{split}.jsonl").read_text().splitlines()[:8]
        (root / TASK / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def student(family: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(family["student"], tmp_path / "student"))


@pytest.fixture
def transfer(
    family: dict[str, Path], student: Path, data: Path, tmp_path: Path
) -> Callable[[], Transfer]:
    """The same transfer, its files read anew."""
    overrides = [
        f"teacher={family['teacher']}",
        f"student={student}",
        f"workdir={tmp_path / 'work'}",
        f"data.root={data}",
        f"data.task={TASK}",
        f"evaluation.tasks=[{TASK}]",
        "evaluation.splits=[dev,test]",
    ]
    return lambda: Transfer.of(resolve([], overrides))


def records(student: Path, data: Path) -> Records:
    return Records(
        candidate=Candidate(name="student", model=Model.open(str(student), dtype="float32")),
        task=TASK,
        split="test",
        examples=load_split(data, TASK, "test"),
        protocol=find_protocol("paper"),
        max_model_len=128,
        min_tier=2,
    )


def edit_row(file: Path) -> None:
    """Another number in the third question."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2]["question"] += " There are 7 more."
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def edit_json(file: Path, **values: Any) -> None:
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(held | values))


@pytest.mark.parametrize("split", ["train", "extract", "dev", "test"])
def test_an_edited_row_makes_another_run(
    transfer: Callable[[], Transfer], data: Path, split: str
) -> None:
    before = transfer()
    assert transfer().key == before.key
    edit_row(data / TASK / f"{split}.jsonl")
    assert transfer().key != before.key


def test_rows_are_known_by_their_content_alone(
    transfer: Callable[[], Transfer], data: Path
) -> None:
    """The same rows written again, later and with other spaces, are the same run."""
    before = transfer().key
    for file in (data / TASK).iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(f"{json.dumps(row, indent=None)} \n" for row in rows))
    assert transfer().key == before


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_edited_row_makes_again_what_it_decides(
    transfer: Callable[[], Transfer], student: Path, data: Path, split: str
) -> None:
    """Of a training row the stores and the result; of a test row nothing but its records."""
    before, scored = transfer(), records(student, data).key
    edit_row(data / TASK / f"{split}.jsonl")
    after = transfer()
    assert [a.key for a in after.first] == [a.key for a in before.first]
    [old, *_], [new, *_] = before.possible(), after.possible()
    changed = {a.kind for a, b in zip(old.artifacts, new.artifacts, strict=True) if a.key != b.key}
    assert changed == ({"activations", "training"} if split == "train" else set())
    assert (records(student, data).key != scored) == (split == "test")


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
        ("generation_config.json", {"eos_token_id": [2, 5]}),
    ],
    ids=["chat template", "stop ids"],
)
def test_how_the_student_is_served_decides_its_records(
    transfer: Callable[[], Transfer],
    student: Path,
    data: Path,
    file: str,
    values: dict[str, Any],
) -> None:
    """And the run that they are of; not what it is trained to."""
    before, scored = transfer(), records(student, data).key
    assert records(student, data).key == scored
    edit_json(student / file, **values)
    after = transfer()
    assert records(student, data).key != scored
    assert after.key != before.key
    [old, *_], [new, *_] = before.possible(), after.possible()
    assert [a.key for a in old.artifacts] == [a.key for a in new.artifacts]
