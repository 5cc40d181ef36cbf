"""Rows whose own reference answer fails their tests are refused before a model is scored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from semalign import zoo
from semalign.config.sections import Evaluation, Sandbox
from semalign.errors import UserError
from semalign.stages import references
from semalign.stages.references import KNOWN, check_references, references_key
from semalign.tasks import load_split

BENCHMARKS = os.environ.get("SEMALIGN_BENCHMARKS")
SORT = {
    "task_id": "own/sort",
    "prompt": 'def order(x):\n    """Sort in place."""\n',
    "entry_point": "order",
    "canonical_solution": "    x.sort()\n",
    "test": "def check(candidate):\n    assert candidate([2, 1]) is None\n",
}
FAILING = {
    "numpy": (
        "import numpy as np\ndef check(candidate):\n    assert np.array(candidate([1])) is None\n",
        "No module named 'numpy'",
    ),
    "in place": (
        "def check(candidate):\n    a = [3, 1, 2]\n    candidate(a)\n    assert a == [1, 2, 3]\n",
        "AssertionError",
    ),
    "name": ("def check(candidate):\n    assert helper(candidate)\n", "NameError"),
}


def settings(task: str) -> Evaluation:
    return Evaluation(tasks=(task,), splits=("test",), sandbox=Sandbox(num_workers=2))


def written(root: Path, task: str, *rows: dict[str, Any]) -> Path:
    (root / task).mkdir(parents=True, exist_ok=True)
    (root / task / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


def test_rows_are_named_with_their_errors(tmp_path: Path) -> None:
    rows = [{**SORT, "task_id": name, "test": test} for name, (test, _) in FAILING.items()]
    root = written(tmp_path / "data", "humaneval", SORT, *rows)
    with pytest.raises(UserError) as error:
        check_references(settings("humaneval"), root, tmp_path / "work")
    text = str(error.value)
    assert text.startswith(f"{root}/humaneval/test.jsonl: the reference answers of 3 of 4 rows")
    for name, (_, reason) in FAILING.items():
        assert f"{name}: " in text and reason in text
    assert "\n" not in text and not (tmp_path / "work").exists()


@pytest.mark.parametrize("start, end", [([[3, 1]], [[1, 3]]), ({0: [3, 1]}, {0: [1, 3]})])
def test_a_change_within_an_argument_is_not_seen(tmp_path: Path, start: Any, end: Any) -> None:
    lines = f"a = {start}", "candidate(a[0])", f"assert a == {end}"
    test = "".join(["def check(candidate):\n", *(f"    {line}\n" for line in lines)])
    root = written(tmp_path / "data", "humaneval", {**SORT, "test": test})
    with pytest.raises(UserError, match="AssertionError"):
        check_references(settings("humaneval"), root, tmp_path / "work")


def test_a_solution_that_does_not_do_what_its_tests_want(tmp_path: Path) -> None:
    row = {
        "task_id": 7,
        "text": "One.",
        "code": "def f(): return 2",
        "test_list": ["assert f()==1"],
    }
    root = written(tmp_path / "data", "mbpp", row)
    with pytest.raises(UserError, match=r"1 of 1 rows fail .*\(mbpp/7: AssertionError"):
        check_references(settings("mbpp"), root, tmp_path / "work")


def test_rows_that_passed_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, work = written(tmp_path / "data", "humaneval", SORT), tmp_path / "work"
    check_references(settings("humaneval"), root, work)
    assert len(list((work / "references").iterdir())) == 1
    monkeypatch.setattr(references, "failing", lambda *_: {"own/sort": "run again"})
    check_references(settings("humaneval"), root, work)
    written(root, "humaneval", SORT | {"task_id": "own/other"})
    with pytest.raises(UserError, match="run again"):
        check_references(settings("humaneval"), root, work)
    check_references(settings("gsm8k"), root, work)  # no code: nothing to run


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_the_shipped_rows_are_known_to_pass(task: str) -> None:
    for split in ("extract", "align", "train", "dev", "test"):
        assert references_key(load_split(zoo.path("zoo/data"), task, split)) in KNOWN


@pytest.mark.skipif(BENCHMARKS is None, reason="SEMALIGN_BENCHMARKS names no folder")
@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_the_published_rows_are_known_to_pass(task: str) -> None:
    assert references_key(load_split(Path(str(BENCHMARKS)), task, "test")) in KNOWN
