"""A disk that is too small is refused before, and one that fills up is named: real full disks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from semalign.artifacts.artifact import Cost, Workspace
from semalign.errors import UserError
from semalign.files import disk_full, free_bytes, naming_full_disk
from tests.artifacts.texts import Words

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, eq=False)
class Large(Words):
    """Words that take so many bytes."""

    size: int

    def cost(self) -> Cost:
        return Cost(disk=self.size)

    def bytes_kept(self, folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.glob("*"))


def test_more_than_is_free_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    workspace, free = Workspace(tmp_path / "not" / "yet"), free_bytes(tmp_path)
    workspace.check_room([Large(text="a", size=free // 2)])
    with pytest.raises(
        UserError, match=r"yet: .* are to be written there and .* are free, so .* a"
    ):
        workspace.check_room([Large(text="a", size=free), Large(text="b", size=free)])
    assert not (tmp_path / "not").exists()


def test_what_is_there_needs_no_room(tmp_path: Path) -> None:
    workspace, wanted = Workspace(tmp_path), Large(text="a", size=100)
    assert workspace.bytes_to_write([wanted]) == {tmp_path: 100}
    workspace.place(wanted).mkdir(parents=True)
    (workspace.place(wanted) / "part").write_text("x" * 60)
    assert workspace.bytes_to_write([wanted]) == {tmp_path: 40}
    workspace.finish(wanted, workspace.place(wanted), {}, 0.0)
    assert workspace.bytes_to_write([wanted]) == {}


def test_an_error_of_another_kind_passes(tmp_path: Path) -> None:
    for error in (ValueError("a"), UserError("No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)), naming_full_disk(tmp_path, lambda: 5):
            raise error
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise ValueError("the file could not be written") from error
    except ValueError as error:
        assert disk_full(error)


WRITERS = """
import shutil, sqlite3, sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, torch
from safetensors.torch import save_file
from semalign.errors import Failed
from semalign.files import naming_full_disk, write_text

work, numbers = Path(sys.argv[1]), np.random.default_rng(0).random(100_000)

def database(file):
    with sqlite3.connect(file) as connection:
        connection.execute("create table t (a text)")
        connection.execute("insert into t values (?)", ("x" * 1_000_000,))

for write in (
    lambda file: write_text(file, "x" * 1_000_000),
    lambda file: save_file({"a": torch.tensor(numbers)}, file),
    lambda file: torch.save(torch.tensor(numbers), file),
    lambda file: pq.write_table(pa.table({"a": numbers}), file),
    database,
):
    try:
        with naming_full_disk(work, lambda: 10**9):
            write(work / "file")
    except Failed as error:
        print(error)
    (work / "file").unlink(missing_ok=True)
    assert list(work.iterdir()) == []
"""


def on_small_disk(folder: Path, size: str, *command: str) -> Any:
    """Run Python on a tmpfs of that size, in namespaces of its own."""
    mount = f"mount -t tmpfs -o size={size} tmpfs {folder} && "
    namespaces = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    probe = subprocess.run([*namespaces, mount + "true"], capture_output=True)
    if probe.returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    return subprocess.run(
        [*namespaces, f'{mount} exec "$@"', "sh", sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_whatever_writes_a_full_disk_is_one_line(tmp_path: Path) -> None:
    done = on_small_disk(tmp_path, "200k", "-c", WRITERS, str(tmp_path))
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    for line in lines:
        assert line.startswith(f"workdir={tmp_path}: the disk is full; ")
        assert "are free and about 1 GB still to be written, so 1 GB are missing. Make room" in line


def test_a_transfer_that_will_not_fit_is_refused_by_run_and_plan(tmp_path: Path) -> None:
    code = "import sys; from semalign.cli import main; print([main(sys.argv[1:] + last) for last in"
    words = ["transfer", f"workdir={tmp_path}/work", "data.train_limit=100"]
    done = on_small_disk(tmp_path, "2M", "-c", f"{code} ([], ['--plan'])])", *words)
    assert done.stdout.splitlines()[-1] == "[2, 2]", done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line in lines:
        assert line.startswith(f"error: {tmp_path}/work: 5.")
        assert line.endswith("MB are missing; make room, or choose a folder on another disk")
    assert len(lines) == 2 and "Traceback" not in done.stderr
