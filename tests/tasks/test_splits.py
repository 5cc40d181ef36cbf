"""Where splits are found, and that a published one is read whole or refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from semalign.errors import UserError
from semalign.tasks import HUB, TASKS, load_split, split_path, split_source
from semalign.tasks.profile import Published

BENCHMARKS = os.environ.get("SEMALIGN_BENCHMARKS")

Row = dict[str, Any]


def published(task: str) -> Published:
    found = TASKS[task].published
    assert found is not None
    return found


def sum_row(number: int) -> Row:
    return {"question": f"What is {number} + 1?", "answer": f"One more.\n#### {number + 1}"}


def choice_row(number: int) -> Row:
    choices = [str(number + offset) for offset in range(4)]
    return {"question": f"{number}?", "subject": "sums", "choices": choices, "answer": number % 4}


def humaneval_row(number: int) -> Row:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def f{number}():\n",
        "entry_point": f"f{number}",
        "canonical_solution": f"    return {number}\n",
        "test": f"def check(candidate):\n    assert candidate() == {number}\n",
    }


def mbpp_row(number: int) -> Row:
    return {
        "task_id": number,
        "text": f"Write a function that gives {number}.",
        "code": f"def f{number}():\n    return {number}\n",
        "test_list": [f"assert f{number}() == {number}"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def write(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_the_published_files_hold_the_published_splits(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "humaneval" / f"HumanEval{suffix}", map(humaneval_row, range(164)))
    file = write(tmp_path / "mbpp" / f"mbpp{suffix}", map(mbpp_row, range(1, 975)))
    whole = load_split(tmp_path, "humaneval", "test")
    assert [example.id for example in whole] == [f"HumanEval/{n}" for n in range(164)]
    ends = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
    for split, (first, last) in ends.items():
        found = [example.id for example in load_split(tmp_path, "mbpp", split)]
        assert found == [f"mbpp/{number}" for number in range(first, last + 1)]
        assert split_path(tmp_path, "mbpp", split) == file
        assert split_source(tmp_path, "mbpp", split) == str(file)


def test_a_split_of_ones_own_comes_before_the_published_file(tmp_path: Path) -> None:
    write(tmp_path / "mbpp" / "mbpp.jsonl", map(mbpp_row, range(1, 975)))
    own = write(tmp_path / "mbpp" / "test.jsonl.gz", map(mbpp_row, range(5000, 5003)))
    assert split_path(tmp_path, "mbpp", "test") == own
    assert len(load_split(tmp_path, "mbpp", "test")) == 3
    assert len(load_split(tmp_path, "mbpp", "validation")) == 90
    plain = write(tmp_path / "mbpp" / "test.jsonl", map(mbpp_row, range(5000, 5002)))
    assert split_path(tmp_path, "mbpp", "test") == plain


def test_the_published_file_is_not_a_split(tmp_path: Path) -> None:
    write(tmp_path / "mbpp" / "mbpp.jsonl", map(mbpp_row, range(1, 975)))
    write(tmp_path / "mbpp" / "extra.jsonl", map(mbpp_row, range(3)))
    with pytest.raises(UserError, match="no split 'mbpp'; expected one of: extra, prompt, test, "):
        load_split(tmp_path, "mbpp", "mbpp")
    with pytest.raises(UserError, match=r"no split 'validate'; did you mean 'validation'\?"):
        load_split(tmp_path, "mbpp", "validate")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (range(163), "expected the 164 published rows, found 163: 'HumanEval/163' is missing"),
        (range(165), "164 published rows, found 165: 'HumanEval/164' is not one of them"),
        ([*range(5), *range(6, 165)], "164 published rows, found 164: 'HumanEval/5' is missing"),
        ([*range(164), 7], "id 'HumanEval/7' occurs twice"),
    ],
)
def test_a_published_file_that_is_not_whole_is_refused(
    tmp_path: Path, numbers: Iterable[int], message: str
) -> None:
    file = write(tmp_path / "humaneval" / "HumanEval.jsonl.gz", map(humaneval_row, numbers))
    with pytest.raises(UserError) as error:
        load_split(tmp_path, "humaneval", "test")
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value)


def test_a_row_missing_anywhere_in_mbpp_is_an_error_for_every_split(tmp_path: Path) -> None:
    write(tmp_path / "mbpp" / "mbpp.jsonl", (mbpp_row(n) for n in range(1, 975) if n != 700))
    for split in published("mbpp").splits:
        with pytest.raises(UserError, match=r"974 published rows, found 973: 'mbpp/700' is missin"):
            load_split(tmp_path, "mbpp", split)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two datasets in the hub's layout: a card that names the files of each configuration."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for task, make in (("gsm8k", sum_row), ("mmlu", choice_row)):
        folder, configuration = tmp_path / task, published(task).hub[1]
        card = ["---", "configs:", f"- config_name: {configuration}", "  data_files:"]
        for split, rows in (("train", 4), ("test", 3)):
            card += [f"  - split: {split}", f"    path: {configuration}/{split}-*"]
            data = datasets.Dataset.from_list([make(number) for number in range(rows)])
            if task == "mmlu":
                data = data.cast_column("answer", datasets.ClassLabel(names=list("ABCD")))
            (folder / configuration).mkdir(parents=True, exist_ok=True)
            data.to_parquet(folder / configuration / f"{split}-00000-of-00001.parquet")
        (folder / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")
        local = dataclasses.replace(
            published(task),
            hub=(str(folder), configuration),
            splits={"train": range(4), "test": range(3), "dev": range(5)},
        )
        monkeypatch.setattr(TASKS[task], "published", local)
    return tmp_path


def test_hub_rows_are_those_of_a_file(hub: Path, tmp_path: Path) -> None:
    for task, make in (("gsm8k", sum_row), ("mmlu", choice_row)):
        write(tmp_path / "files" / task / "test.jsonl", map(make, range(3)))
        assert load_split(HUB, task, "test") == load_split(tmp_path / "files", task, "test")
        assert len(load_split(HUB, task, "train")) == 4


def test_hub_errors_are_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"hub:{hub / 'gsm8k'}:main:dev"
    with pytest.raises(UserError, match=r"gsm8k:main:dev: cannot be loaded \(") as error:
        load_split(HUB, "gsm8k", "dev")  # the dataset has no such split
    assert str(error.value).startswith(source) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"gsm8k on the hub: no split 'tets'; did you mean 'test'"):
        load_split(HUB, "gsm8k", "tets")
    longer = dataclasses.replace(published("gsm8k"), splits={"test": range(4)})
    monkeypatch.setattr(TASKS["gsm8k"], "published", longer)
    with pytest.raises(UserError, match="expected the 4 published rows, found 3: 'gsm8k/3' is mis"):
        load_split(HUB, "gsm8k", "test")
    other = dataclasses.replace(published("gsm8k"), hub=published("mmlu").hub)
    monkeypatch.setattr(TASKS["gsm8k"], "published", other)
    with pytest.raises(UserError, match=r"mmlu:all:test:1: field 'answer' must be str, found int"):
        load_split(HUB, "gsm8k", "test")


def test_a_hub_out_of_reach_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    absent = dataclasses.replace(published("gsm8k"), hub=("semalign-absent/gsm8k", "main"))
    monkeypatch.setattr(TASKS["gsm8k"], "published", absent)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:  # conftest.py is offline; online it is not found
        load_split(HUB, "gsm8k", "test")
    message = str(error.value)
    assert message.startswith("hub:semalign-absent/gsm8k:main:test: cannot be loaded (")
    assert message.endswith("or name a folder that holds gsm8k/test.jsonl")


def test_every_task_has_published_splits() -> None:
    assert all(task.published for task in TASKS.values())
    sizes = {
        task: {split: len(numbers) for split, numbers in published(task).splits.items()}
        for task in TASKS
    }
    assert sizes["mbpp"] == {"prompt": 10, "test": 500, "validation": 90, "train": 374}
    assert split_source(HUB, "mmlu", "test") == "hub:cais/mmlu:all:test"


@pytest.mark.skipif(BENCHMARKS is None, reason="SEMALIGN_BENCHMARKS names no folder")
@pytest.mark.parametrize(
    ("task", "split", "count"),
    [
        ("humaneval", "test", 164),
        ("mbpp", "test", 500),
        ("mbpp", "validation", 90),
        ("mbpp", "train", 374),
        ("mbpp", "prompt", 10),
        ("gsm8k", "test", 1319),
        ("gsm8k", "train", 7473),
        ("mmlu", "test", 14042),
        ("mmlu", "dev", 285),
    ],
)
def test_published_splits_are_read_whole_and_quickly(task: str, split: str, count: int) -> None:
    begin = time.perf_counter()
    examples = load_split(Path(str(BENCHMARKS)), task, split)
    assert time.perf_counter() - begin < 10
    assert [example.id for example in examples] == published(task).ids([split])
    assert len(examples) == count
    if task == "mmlu":
        assert len({example.row["subject"] for example in examples}) == 57
