"""Rows -> prompts -> extracted answers, and the errors for rows that are wrong."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from semalign.errors import UserError
from semalign.sandbox.program import Program
from semalign.tasks import TASKS, load_split, read_rows
from semalign.tasks.gsm8k import final_number, last_number
from semalign.tasks.protocols import find_protocol
from semalign.tasks.task import cut

BENCHMARKS = os.environ.get("SEMALIGN_BENCHMARKS")
PAPER = find_protocol("paper")

ROWS: dict[str, dict[str, Any]] = {
    "mmlu": {"question": "1+1?", "subject": "sums", "choices": ["1", "2", "3", "4"], "answer": 1},
    "gsm8k": {"question": "Two and two?", "answer": "It is 2+2=<<2+2=4>>4.\n#### 4"},
    "humaneval": {
        "task_id": "HumanEval/7",
        "prompt": "def one():\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    },
    "mbpp": {
        "task_id": 11,
        "text": "Write a function for 1.",
        "code": "def one():\r\n    return 1\r\n",
        "test_list": ["assert one() == 1", "assert one() != 2"],
    },
}


@pytest.mark.parametrize(
    ("task", "id", "prompt", "answer"),
    [
        ("mmlu", "mmlu/3", "Question: 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", " B"),
        ("gsm8k", "gsm8k/3", "Question: Two and two?\nAnswer:", " It is 2+2=4.\n#### 4"),
        ("humaneval", "HumanEval/7", "def one():\n", "    return 1\n"),
        (
            "mbpp",
            "mbpp/11",
            "Task: Write a function for 1.\nTests:\nassert one() == 1\nassert one() != 2\nCode:\n",
            "def one():\n    return 1\n",
        ),
    ],
)
def test_prompts_are_exactly_these(task: str, id: str, prompt: str, answer: str) -> None:
    example = TASKS[task].example(ROWS[task], 3)
    assert (example.id, example.prompt, example.answer) == (id, prompt, answer)
    assert example.task == task


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 1+1=2\n#### 2", "2"),
        ("#### 1,234.", "1234"),
        ("#### -5", "-5"),
        ("#### $24.00 in all", "24.00"),
        ("the answer is 3/4", "4"),
        ("first 7, then 1,000,000", "1000000"),
        ("16-3", "3"),
        ("lists such as 1,2 are not thousands", "2"),
        ("12\n#### 5\n#### 6", "5"),
        ("5 #### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_numbers_are_compared_as_numbers() -> None:
    correct, row = TASKS["gsm8k"].readers["final-number"].correct, ROWS["gsm8k"]
    assert correct("4.00", row) and correct("4", row)
    assert not correct("44", row) and not correct(None, row)


ROUND = ("5", "-5", "1,200", "$24.00", ".5", "50%", "18 dollars", "5 km/h", "5 half-days", "7.")
UNCLEAR = (
    "1 000",
    "1'000",
    "12,34",
    "1.234.567",
    "\N{MINUS SIGN}5",
    "- 5",
    "±5",
    "1/2",
    "½",
    "5½",
    "5²",
    "2^3",
)
UNCLEAR += (
    "1.5e3",
    "3:30",
    "5-6",
    "~5",
    "(5)",
    "5k",
    "5 million",
    "5 and a half",
    "\N{FULLWIDTH DIGIT FIVE}",
    "two",
    "",
)
UNCLEAR += ("5\n#### 6",)


@pytest.mark.parametrize("reference", ROUND)
def test_references_that_are_one_number(reference: str) -> None:
    assert TASKS["gsm8k"].check({"question": "?", "answer": f"So.\n#### {reference}"}) is None


@pytest.mark.parametrize("reference", UNCLEAR)
def test_references_with_something_left_over_are_refused(reference: str, tmp_path: Path) -> None:
    row = {"question": "?", "answer": f"So.\n#### {reference}"}
    with pytest.raises(UserError) as error:
        read_rows(write(tmp_path / "rows.jsonl", row), TASKS["gsm8k"])
    assert "rows.jsonl:1: field 'answer' must end in '#### number'" in str(error.value)
    assert repr(f"#### {reference}") in str(error.value)


# Oracles of open-instruct's extraction, with its oddities: no sign, no thousands, all punctuation
# gone before the comparison.
@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.", "1234"),
        ("-5", "5"),
        ("$24.00", "24.00"),
        ("3/4", "4"),
        ("1,000,000", "1000000"),
        ("none", "none"),
    ],
)
def test_open_instruct_reads_the_last_number(text: str, number: str) -> None:
    assert last_number(text) == number


def test_open_instruct_compares_without_punctuation() -> None:
    correct = TASKS["gsm8k"].readers["last-number"].correct
    assert correct("24", {"answer": "#### 24"}) and correct("5", {"answer": "#### -5"})
    assert not correct("24.00", {"answer": "#### 24"})
    assert correct("1234", {"answer": "#### 1,234"})


def test_text_after_a_stop_string_does_not_count() -> None:
    assert cut(" four, 4\nQuestion: 9?\n#", ("\n#", "\nQuestion:")) == " four, 4"
    assert cut("all", ()) == "all"


def test_programs_hold_prompt_completion_and_tests() -> None:
    program = TASKS["humaneval"].program("    return 1\n", ROWS["humaneval"])
    assert program == Program(
        solution="def one():\n    return 1\n\n",
        tests="def check(candidate):\n    assert candidate() == 1\n\ncheck(one)\n",
        context="def one():\n    return 1\n\n",
        entry=("one",),
    )
    row = ROWS["mbpp"] | {"test_setup_code": "two = one() + 1"}
    assert TASKS["mbpp"].program("\ndef one():\r\n    return 1\n", row) == Program(
        solution="def one():\n    return 1\ntwo = one() + 1\n",
        tests="assert one() == 1\nassert one() != 2\n",
        entry=("one",),
    )


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("gsm8k", {"answer": None}, "field 'answer' must be str, found NoneType"),
        ("gsm8k", {"answer": "7"}, "field 'answer' must end in '#### number'"),
        ("mmlu", {"answer": 4}, "field 'answer' must be 0 to 3, found 4"),
        ("mmlu", {"answer": True}, "field 'answer' must be int, found bool"),
        ("mmlu", {"choices": ["a", "b"]}, "field 'choices' must be 4 strings"),
        ("humaneval", {"entry_point": "f(); x"}, "field 'entry_point' must be a Python identifier"),
        ("mbpp", {"test_list": []}, "field 'test_list' must be at least one string"),
        ("mbpp", {"test_setup_code": 3}, "field 'test_setup_code' must be str"),
        ("mbpp", {"code": "def f("}, "field 'code' is not Python ('(' was never closed, line 1)"),
    ],
)
def test_bad_fields_are_named_with_file_and_line(
    tmp_path: Path, task: str, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS[task], "", ROWS[task] | change)
    with pytest.raises(UserError) as error:
        read_rows(path, TASKS[task])
    assert f"{path}:3: {message}" in str(error.value)


@pytest.mark.parametrize("task", TASKS)
def test_every_missing_field_is_named(tmp_path: Path, task: str) -> None:
    for field in TASKS[task].fields:
        row = {name: value for name, value in ROWS[task].items() if name != field}
        with pytest.raises(UserError, match=f":1: field '{field}' is missing"):
            read_rows(write(tmp_path / "rows.jsonl", row), TASKS[task])


def test_files_that_are_no_rows(tmp_path: Path) -> None:
    task = TASKS["gsm8k"]
    for content, message in [
        ("{", r":1: not JSON"),
        ("[1]", r":1: expected a JSON object, found list"),
        ("", r"no rows"),
    ]:
        with pytest.raises(UserError, match=message):
            read_rows(write(tmp_path / "rows.jsonl", content), task)
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_rows(tmp_path / "absent.jsonl", task)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 100)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / "cut.jsonl.gz", task)
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    with pytest.raises(UserError, match=":1: not UTF-8"):
        read_rows(tmp_path / "latin.jsonl", task)


def test_splits(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "test.jsonl.gz", ROWS["gsm8k"], ROWS["gsm8k"])
    assert [example.id for example in load_split(tmp_path, "gsm8k", "test")] == [
        "gsm8k/0",
        "gsm8k/1",
    ]
    with pytest.raises(UserError, match=r"gsm8k: no split 'tests'; did you mean 'test'\?"):
        load_split(tmp_path, "gsm8k", "tests")
    with pytest.raises(UserError, match="no such folder"):
        load_split(tmp_path, "mmlu", "test")
    with pytest.raises(UserError, match=r"task 'gsm8' is unknown; did you mean 'gsm8k'\?"):
        load_split(tmp_path, "gsm8", "test")
    write(tmp_path / "mbpp" / "test.jsonl", ROWS["mbpp"], ROWS["mbpp"])
    with pytest.raises(UserError, match="id 'mbpp/11' occurs twice"):
        load_split(tmp_path, "mbpp", "test")


@pytest.mark.skipif(BENCHMARKS is None, reason="SEMALIGN_BENCHMARKS names no folder")
@pytest.mark.parametrize(
    ("task", "file", "count"),
    [
        ("humaneval", "HumanEval.jsonl.gz", 164),
        ("mbpp", "mbpp.jsonl", 974),
        ("gsm8k", "test.jsonl", 1319),
        ("gsm8k", "train.jsonl.gz", 7473),
        ("mmlu", "test.jsonl.gz", 14042),
        ("mmlu", "dev.jsonl", 285),
    ],
)
def test_published_files_read_whole_and_their_answers_are_correct(
    task: str, file: str, count: int
) -> None:
    rows = read_rows(Path(str(BENCHMARKS)) / task / file, TASKS[task])
    assert len(rows) == count
    for index, row in enumerate(rows):
        example = TASKS[task].example(row, index)
        profile = PAPER.profile(task)
        assert cut(example.answer, profile.stop) == example.answer
        if TASKS[task].kind == "text":
            reader = TASKS[task].readers[profile.reader]
            assert reader.correct(reader.extract(example.answer), row)
