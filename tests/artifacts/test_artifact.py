"""What is made has one name, is made once whoever wants it, and is whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semalign.artifacts.activations import Column
from semalign.artifacts.artifact import MANIFEST, Artifact, Workspace, ordered, union
from semalign.artifacts.local import LocalExecutor, make_all
from semalign.config.sections import Extraction
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens
from semalign.errors import UserError
from semalign.files import check_writable, content_key, locked, read_json
from semalign.models.reference import Model
from semalign.stages.extraction import Activations
from tests.artifacts.texts import (
    Next,
    Others,
    Words,
    check_folders,
    die_while_making,
    ensure_text,
)

SPAWN = multiprocessing.get_context("spawn")


# Names


def test_equal_content_has_one_key_whatever_it_is_called() -> None:
    key = Words(text="a").key
    assert key == Words(text="a", title="other", seconds=9).key
    assert len(key) == 16 and int(key, 16) >= 0
    others = [Words(text="b"), Next(text="a"), Others(text="a"), Words(text="a", sources=(
        Words(text="b"),)), Words(text="a", sources=(Words(text="c"),))]  # fmt: skip
    assert len({key, *(other.key for other in others)}) == 6


def test_the_needs_of_needs_are_part_of_the_key() -> None:
    def deep(text: str) -> Artifact:
        return Words(text="a", sources=(Words(text="b", sources=(Words(text=text),)),))

    assert deep("c").key == deep("c").key != deep("d").key
    first, second = Words(text="1"), Words(text="2")
    assert Words(text="a", sources=(first, second)).key != Words(text="a", sources=(second,)).key


@pytest.mark.parametrize("value", [object(), Path("a"), {1, 2}, b"a", lambda: 0, Words(text="a")])
def test_what_json_does_not_hold_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        content_key({"a": [value]})
    with pytest.raises(TypeError):
        _ = Words(text=value).key


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_key(value)


def test_equal_values_and_only_those_give_equal_names() -> None:
    assert content_key({"a": 1, "b": [None, True]}) == content_key({"b": (None, True), "a": 1})
    values = [1, 2, "1", None, "null", True, [1], [[1]], {"a": 1}, "", [], {}, 0.1, 0.1 + 1e-16]
    assert len({content_key(value) for value in values}) == len(values)
    assert content_key("a", "b") != content_key("ab") != content_key(["a", "b"])
    assert content_key(1 / 3) != content_key(0.333) != content_key(0.3333333333333333 + 1e-15)


# Sets


def test_a_union_has_each_key_once_in_the_order_of_the_first() -> None:
    a, b, c = (Words(text=text) for text in "abc")
    found = union([b, a, Words(text="b", title="again"), c, a])
    assert [artifact.key for artifact in found] == [b.key, a.key, c.key]
    assert found[0] is b


def test_requests_for_one_store_are_joined() -> None:
    def request(*columns: Column, **changed: Any) -> Activations:
        made = Activations(
            model=Model.open("zoo/student", dtype="float32"),
            rows=Dataset([Tokens("a", (1, 2, 3), 1)]),
            columns=frozenset(columns),
            positions="all",
            dtype="float32",
            extraction=Extraction(),
        )
        return replace(made, **changed)

    one, two, other = Column(1, "mlp"), Column(2, "attn"), Column(3, "mlp")
    first, second = request(one, two), request(two, other)
    apart = request(one, positions="answer")
    found = union([first, apart, second])
    assert first.key == second.key != apart.key
    assert [artifact.columns for artifact in found] == [{one, two, other}, {one}]
    assert found[0].cost().disk == 3 * request(one).cost().disk
    assert first.columns == {one, two}  # as it was


def test_needs_come_first_and_once() -> None:
    a = Words(text="a")
    b, c = Words(text="b", sources=(a,)), Words(text="c", sources=(a,))
    d = Words(text="d", sources=(c, b))
    assert [artifact.text for artifact in ordered([b, d, a])] == ["a", "b", "c", "d"]


# Places


def test_an_artifact_is_found_under_another_label(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    made = Words(text="abc", title="mine")
    LocalExecutor(workspace).make(made)
    assert workspace.place(made) == tmp_path / "texts" / f"mine-{made.key}"
    same = Words(text="abc", title="yours")
    assert workspace.place(same) == workspace.place(made)
    assert workspace.has(same) and workspace.missing([same, Words(text="b")])[0].text == "b"
    assert not workspace.ensure(same, lambda folder: pytest.fail("it is there"))
    assert workspace.place(Words(text="b")).name == f"words-{Words(text='b').key}"


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    source = Words(text="s")
    made = Next(text="abc", sources=(source,))
    make_all(LocalExecutor(workspace), [source, made])
    manifest = workspace.manifest(made)
    assert manifest["length"] == 3 and manifest["seconds"] >= 0 and manifest["made"]
    expected = {"kind": "words", "schema": 2, "key": made.key, "name": "words",
                "identity": {"text": "abc"}, "needs": [source.key]}  # fmt: skip
    assert {name: manifest[name] for name in expected} == expected


def test_a_line_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    executor = LocalExecutor(Workspace(tmp_path))
    executor.make(Words(text="abc"))
    executor.make(Words(text="abc"))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[write] 0.") and first.endswith(" s  3 letters")
    assert second.endswith(" s  cached; 3 letters")
    executor.timer.quiet = True
    executor.make(Words(text="abc"))
    assert capsys.readouterr().out == ""


# Once, and whole


def test_of_two_processes_one_makes_and_the_other_waits(tmp_path: Path) -> None:
    start, results = SPAWN.Barrier(2), SPAWN.Queue()
    both = [SPAWN.Process(target=ensure_text, args=(tmp_path, start, results)) for _ in range(2)]
    for process in both:
        process.start()
    found = dict(results.get(timeout=60) for _ in both)
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    [writer] = (tmp_path / "writers").read_text().split()
    assert found == {process.pid: str(process.pid) == writer for process in both}
    assert [path.name for path in (tmp_path / "texts").iterdir()] == [
        f"words-{Words(text='shared').key}"
    ]


def test_a_make_that_fails_leaves_nothing(tmp_path: Path) -> None:
    workspace, artifact = Workspace(tmp_path), Words(text="abc")

    def fail(folder: Path) -> dict[str, Any]:
        (folder / "text").write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        workspace.ensure(artifact, fail)
    assert not workspace.has(artifact) and [*(tmp_path / "texts").iterdir()] == []
    executor = LocalExecutor(workspace)
    assert (executor.make(artifact) / "text").read_text() == "abc"  # and the lock is free


def test_what_a_killed_process_began_is_not_there(tmp_path: Path) -> None:
    process = SPAWN.Process(target=die_while_making, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    workspace, artifact = Workspace(tmp_path), Words(text="abc")
    assert not workspace.has(artifact)
    assert (LocalExecutor(workspace).make(artifact) / "text").read_text() == "abc"


def test_what_is_kept_while_it_is_made_goes_when_it_is_there(tmp_path: Path) -> None:
    workspace, artifact = Workspace(tmp_path), Words(text="abc")
    scratch = workspace.scratch(artifact)

    def make(folder: Path) -> dict[str, Any]:
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "checkpoint").touch()
        if len([*scratch.iterdir()]) == 1:
            (scratch / "second").touch()
            raise RuntimeError
        return {}

    with pytest.raises(RuntimeError):
        workspace.ensure(artifact, make)
    assert (scratch / "checkpoint").exists()
    assert workspace.ensure(artifact, make)
    assert not scratch.exists()


def test_a_half_written_manifest_is_one_line(tmp_path: Path) -> None:
    workspace, artifact = Workspace(tmp_path), Words(text="abc")
    LocalExecutor(workspace).make(artifact)
    (workspace.place(artifact) / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not JSON .*; delete the folder"):
        workspace.manifest(artifact)
    assert read_json(tmp_path / "absent.json") is None


# Locks


_WAITER = """
import sys
from pathlib import Path
from semalign.files import locked
with locked(Path(sys.argv[1]), "the store of two runs is begun"):
    print("mine")
"""


def test_a_wait_is_reported_once_with_what_it_is_for(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.lock"
    with locked(file, "nobody else is here"):
        waiter = subprocess.Popen(
            [sys.executable, "-c", _WAITER, str(file)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert waiter.stderr is not None
        line = waiter.stderr.readline()  # while the lock is still held here
    out, rest = waiter.communicate(timeout=60)
    purpose = "the store of two runs is begun"
    assert line == f"waiting for another process: {purpose} ({file})\n"
    assert (out, rest, waiter.returncode) == ("mine\n", "", 0)


def test_a_free_lock_says_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WAITER, str(tmp_path / "a.lock")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == ("mine\n", "")


def test_two_processes_check_one_new_folder_at_once(tmp_path: Path) -> None:
    start = SPAWN.Barrier(2)
    both = [SPAWN.Process(target=check_folders, args=(tmp_path / "new", start)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len([*(tmp_path / "new").iterdir()]) == 200
    assert [*(tmp_path / "new").glob("*/*")] == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^workdir=.*/file/new: cannot be written \("):
        check_writable(tmp_path / "file" / "new")


def test_a_manifest_is_sorted_json(tmp_path: Path) -> None:
    """Equal content, equal bytes but for the time."""
    workspace = Workspace(tmp_path)
    LocalExecutor(workspace).make(Words(text="abc"))
    text = (workspace.place(Words(text="abc")) / MANIFEST).read_text()
    names = list(json.loads(text))
    assert names == sorted(names)
