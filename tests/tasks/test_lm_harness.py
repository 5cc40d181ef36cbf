"""The lm-eval protocol against lm_eval itself: its stock task files, its evaluator, same rows."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from semalign.errors import UserError
from semalign.tasks.lm_harness import LibraryRequest, library_requests, library_verdicts

BENCHMARKS = os.environ.get("SEMALIGN_BENCHMARKS")

NUMBER = {"question": "How much is it?", "answer": "It is 1,000 + 234.\n#### 1,234"}
DEBT = {"question": "And now?", "answer": "2 - 7 = <<2-7=-5>>-5\n#### -5"}
# What a template language, a stripper or a reader of digits could trip over.
QUESTIONS = [" Which one?\n", "{{ answer }} {% raw %}", "7", "a_b <|im_end|> Q: é\u2028漢", "[1]"]
CHOICES = [["1", "2", "3", "4"], ["{{ x }}", " b ", "", "D"], ["[A]", "a_b", "\\$", "4\n5"]]


def stock(relative: str, rows: Sequence[dict[str, Any]]) -> Any:
    """A task of lm_eval's own files over the given rows, its few-shot split included."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / relative)
    docs = Dataset.from_list(list(rows))
    splits = dict.fromkeys(("train", "dev", "test"), docs)
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: splits})


def subjects() -> Iterator[tuple[str, str]]:
    """Every stock MMLU task: its file and its subject."""
    import lm_eval.tasks

    for path in sorted(Path(lm_eval.tasks.__file__).parent.glob("mmlu/default/mmlu_*.yaml")):
        yield f"mmlu/default/{path.name}", path.stem.removeprefix("mmlu_")


def stock_requests(relative: str, rows: Sequence[dict[str, Any]]) -> list[list[tuple[Any, ...]]]:
    task = stock(relative, rows)
    task.build_all_requests()
    found: list[list[tuple[Any, ...]]] = [[] for _ in rows]
    for instance in task.instances:
        found[instance.doc_id].append(instance.args)
    return found


def published(path: str) -> list[dict[str, Any]]:
    file = Path(str(BENCHMARKS)) / path
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def same_mmlu(rows: Sequence[dict[str, Any]], *, count: int) -> None:
    tasks = {subject: relative for relative, subject in subjects()}
    assert len(tasks) == 57
    wanted = library_requests("mmlu", rows)
    for subject, relative in tasks.items():
        mine = [index for index, row in enumerate(rows) if row["subject"] == subject]
        count -= len(mine)
        theirs = stock_requests(relative, [rows[index] for index in mine])
        for index, arguments in zip(mine, theirs, strict=True):
            assert arguments == [(wanted[index].prompt, choice) for choice in wanted[index].choices]
    assert count == 0


def test_mmlu_prompts_are_those_of_all_57_stock_tasks() -> None:
    rows = [
        {"question": question, "subject": subject, "choices": choices, "answer": 3}
        for _, subject in subjects()
        for question in QUESTIONS
        for choices in CHOICES
    ]
    same_mmlu(rows, count=57 * 15)


def same_gsm8k(rows: Sequence[dict[str, Any]]) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    theirs = stock_requests("gsm8k/gsm8k-cot-zeroshot.yaml", rows)
    for request, [(prompt, options)] in zip(library_requests("gsm8k", rows), theirs, strict=True):
        how = normalize_gen_kwargs(options)
        assert (how["do_sample"], how["temperature"]) == (False, 0.0)
        stop, limit = tuple(how["until"]), how["max_gen_toks"]
        assert request == LibraryRequest(prompt=prompt, stop=stop, max_tokens=limit)


def test_gsm8k_prompts_stops_and_length_are_those_of_the_stock_task() -> None:
    same_gsm8k([{"question": question, "answer": "#### 1"} for question in QUESTIONS])


@pytest.mark.skipif(BENCHMARKS is None, reason="SEMALIGN_BENCHMARKS names no folder")
def test_prompts_of_the_published_files() -> None:
    rows = published("mmlu/test.jsonl.gz")
    same_mmlu(rows, count=len(rows))
    same_gsm8k(published("gsm8k/test.jsonl"))


# output, answer by flexible-extract, right, right by strict-match
NUMBERS = [
    ("1000 and 234 make 1234", "1234", True, False),
    ("The answer is 1,234.", "1,234.", True, True),
    ("The answer is 1,234", "1,234", True, False),  # strict-match wants a character after it
    ("That is $1,234.", "$1,234.", True, False),
    ("The answer is 1234. Or 1235.", "1235.", False, True),
    ("-1234", "-1234", False, False),
    ("1234.0", "1234.0", False, False),
    ("8", "8", False, False),
    ("1234 ...", "...", False, False),
    ("no number", None, False, False),
    ("", None, False, False),
    ("1234\n\nQ: And 9?", "1234", True, False),
    ("1234</s> 9", "1234", True, False),
    ("9<|im_end|>1234", "9", False, False),
]
DEBTS = [
    ("-5", "-5", True, False),
    ("The answer is -5.", "-5.", True, True),
    ("2-7=-5", "-5", True, False),
    ("5", "5", False, False),
    ("- 5", "5", False, False),
]


@pytest.mark.parametrize(("row", "cases"), [(NUMBER, NUMBERS), (DEBT, DEBTS)])
def test_numbers_are_read_as_lm_eval_reads_them(
    row: dict[str, Any], cases: list[tuple[str, str | None, bool, bool]]
) -> None:
    outputs = [output for output, *_ in cases]
    judged = library_verdicts("gsm8k", [row] * len(outputs), outputs)
    found = [(out, j.extracted, j.correct, j.other) for out, j in zip(outputs, judged, strict=True)]
    assert found == [
        (output, answer, right, {"strict-match": strict}) for output, answer, right, strict in cases
    ]


def test_the_stock_task_judges_every_number_alike() -> None:
    rows = [row for row, cases in [(NUMBER, NUMBERS), (DEBT, DEBTS)] for _ in cases]
    outputs = [output for output, *_ in [*NUMBERS, *DEBTS]]
    judged = library_verdicts("gsm8k", rows, outputs)
    verdicts = {"flexible-extract": [j.correct for j in judged]}
    verdicts["strict-match"] = [j.other["strict-match"] for j in judged]
    # An output as a model of lm_eval returns it: cut by lm_eval's own function.
    from lm_eval.models.utils import postprocess_generated_text

    stops = list(library_requests("gsm8k", rows)[0].stop)
    task = stock("gsm8k/gsm8k-cot-zeroshot.yaml", rows)
    task.build_all_requests()
    for instance, output in zip(task.instances, outputs, strict=True):
        instance.resps.append(postprocess_generated_text(output, stops, None))
    task.apply_filters()
    for name, mine in verdicts.items():
        theirs = [
            task.process_results(instance.doc, [instance.filtered_resps[name]])["exact_match"]
            for instance in task.instances
        ]
        assert theirs == mine


def test_the_likeliest_choice_counts_and_the_first_of_equals() -> None:
    row = {"question": "?", "subject": "anatomy", "choices": list("wxyz"), "answer": 1}
    scores = [(-2.0, -1.0, -3.0, -4.0), (-1.0, -1.0, -2.0, -2.0), (-2.0, -1.0, -1.0, -1.0)]
    judged = library_verdicts("mmlu", [row | {"more": [1, "?"]}] * 3, scores)
    assert [(j.extracted, j.correct) for j in judged] == [("B", True), ("A", False), ("B", True)]
    task = stock("mmlu/default/mmlu_anatomy.yaml", [row])
    theirs = [task.process_results(row, [(score, False) for score in four]) for four in scores]
    assert [bool(result["acc"]) for result in theirs] == [j.correct for j in judged]


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="protocol lm-eval has no task 'mbpp'; expected one of"):
        library_requests("mbpp", [NUMBER])
    with pytest.raises(ValueError, match="1 rows, 2 outputs"):
        library_verdicts("gsm8k", [NUMBER], ["1", "2"])
    assert library_requests("mmlu", []) == library_verdicts("mmlu", [], []) == []


def test_lm_eval_is_imported_late_and_nothing_is_printed_or_written(tmp_path: Path) -> None:
    program = f"""
import sys
from semalign.tasks.lm_harness import library_requests, library_verdicts
assert not {{"lm_eval", "torch"}} & set(sys.modules)
rows = {[NUMBER] * 3}
assert len(library_requests("gsm8k", rows)) == 3
assert all(judged.correct for judged in library_verdicts("gsm8k", rows, ["1234"] * 3))
assert "lm_eval" in sys.modules and "torch" not in sys.modules
"""
    unset = ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
