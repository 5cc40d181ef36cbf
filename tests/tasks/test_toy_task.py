"""A task added in one file: registered, read from a folder, prompted and scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from semalign import zoo
from semalign.config.sections import Sandbox
from semalign.errors import UserError
from semalign.models.loading import load_tokenizer
from semalign.stages.scoring import Generation, judge, requests
from semalign.tasks import HUB, TASKS, Profile, Row, find_task, load_split, register_task
from semalign.tasks.protocols import PROTOCOLS, find_protocol
from tests.extending.test_toy_task import ANSWERS, Parity


class Grouped(Parity):
    """Reported by size of the number, too."""

    def group(self, row: Row) -> str:
        return "small" if row["number"] < 10 else "large"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The task registered for one test, and a folder with three rows of it."""
    monkeypatch.setattr(TASKS, "_things", dict(TASKS))
    register_task(Grouped())
    (tmp_path / "parity").mkdir()
    lines = "".join(json.dumps({"number": number}) + "\n" for number in (4, 7, 12))
    (tmp_path / "parity" / "test.jsonl").write_text(lines)
    return tmp_path


def test_its_rows_are_read_from_a_folder(root: Path) -> None:
    assert list(TASKS) == ["mmlu", "gsm8k", "humaneval", "mbpp", "parity"]
    examples = load_split(root, "parity", "test")
    assert [example.id for example in examples] == ["parity/0", "parity/1", "parity/2"]
    assert [example.answer for example in examples] == [" A", " B", " A"]
    assert examples[1].prompt == "Question: 7\nA. even\nB. odd\nAnswer:"
    with pytest.raises(UserError, match=r"parity: no split 'tets'; did you mean 'test'\?"):
        load_split(root, "parity", "tets")
    with pytest.raises(UserError, match="root=hub: task 'parity' is not on the hub; expected a fo"):
        load_split(HUB, "parity", "test")
    (root / "parity" / "bad.jsonl").write_text('{"number": "four"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1: field 'number' must be int, found str"):
        load_split(root, "parity", "bad")
    with pytest.raises(UserError, match=r"task 'parit' is unknown; did you mean 'parity'\?"):
        find_task("parit")


def test_it_is_scored_under_a_protocol_that_does_not_know_it(root: Path) -> None:
    examples, protocol = load_split(root, "parity", "test"), find_protocol("paper")
    tokenizer = load_tokenizer(zoo.path("zoo/student"))
    made = requests(examples, tokenizer, protocol, max_model_len=512)
    [choices] = {request.choice_ids for request in made}
    assert choices is not None and [tokenizer.decode(i) for i in choices] == list(ANSWERS)
    assert tokenizer.decode(made[0].prompt_ids, skip_special_tokens=True) == examples[0].prompt
    scores = ((-1.0, -2.0), (-1.0, -2.0), (-3.0, -3.0))
    records = judge(
        examples,
        made,
        [Generation(choice_scores=pair) for pair in scores],
        split="test",
        protocol=protocol,
        sandbox=Sandbox(),
    )
    found = [(record.id, record.extracted, record.correct, record.group) for record in records]
    assert found == [
        ("parity/0", "A", True, "small"),
        ("parity/1", "A", False, "small"),
        ("parity/2", "A", True, "large"),
    ]
    assert {record.profile for record in records} == {protocol.label("parity")}


def test_the_protocols_of_other_tasks_stay_as_they_are(root: Path) -> None:
    with_it = {name: protocol.hash for name, protocol in PROTOCOLS.items()}
    del TASKS._things["parity"]
    assert {name: protocol.hash for name, protocol in PROTOCOLS.items()} == with_it


def test_it_can_have_a_profile_for_one_protocol(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Profile(prompt="Is {{ number }} even?", prefix="Answer:", chat="tulu", choices=ANSWERS)
    monkeypatch.setattr(Parity, "profiles", {"open-instruct": chat})
    assert find_protocol("open-instruct").profile("parity") == chat
    assert find_protocol("paper-1").profile("parity") == Parity.profile
    assert find_protocol("paper").profile("parity") == replace(Parity.profile, strip=True)
    monkeypatch.setattr(Parity, "profile", None)
    with pytest.raises(UserError, match="protocol 'paper' has no profile for parity; it has mmlu"):
        find_protocol("paper").profile("parity")
