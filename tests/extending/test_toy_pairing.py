"""A pairing strategy of one's own in one file: the middle of either model."""

from __future__ import annotations

from pathlib import Path

import pytest

from semalign import register_pairing
from semalign.core.pairing import PaperPair, Request
from tests.extending.check import listed, made, planned, swept


def middle(request: Request) -> list[PaperPair]:
    """The middle layer of the teacher with that of the student."""
    return [({(request.num_teacher_layers + 1) // 2: 1.0}, (request.num_student_layers + 1) // 2)]


if __name__ == Path(__file__).stem:  # as a plugin
    register_pairing("middle", middle, looks_at=())


def test_it_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "The middle layer of the teacher" in listed("strategies", __file__, capsys)


def test_it_is_planned_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(__file__, "pairing.strategy=middle", capsys=capsys)
    assert "teacher 3 -> student 2" in text and "attribute" not in text
    assert made(tmp_path, __file__, "pairing.strategy=middle")["pairs"] == [
        "teacher 3 -> student 2 (counted from 1)"
    ]
    assert not (tmp_path / "attributions").exists()  # what it does not look at is not computed


def test_it_is_swept(tmp_path: Path) -> None:
    assert swept(tmp_path, __file__, "pairing.strategy: [middle, last]") == 3  # and the base
