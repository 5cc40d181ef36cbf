"""Which items are scored, and the faults of a data folder, all at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from semalign import zoo
from semalign.config.read import resolve
from semalign.config.sections import Evaluation
from semalign.data.root import check_splits, data_root, scored_examples
from semalign.engine.evaluation import wanted_records
from semalign.errors import UserError
from semalign.methods import Transfer
from semalign.methods.method import effective
from semalign.models.reference import Model
from semalign.stages.judged import Candidate, evaluated_items
from semalign.tasks import load_split

ROOT = zoo.path("zoo/data")


def test_the_first_items_or_drawn_ones_are_scored() -> None:
    whole = load_split(ROOT, "mmlu", "dev")
    first = Evaluation(tasks=("mmlu",), splits=("dev",), limit=5)
    assert scored_examples(first, ROOT, "mmlu", "dev") == whole[:5]
    assert first.limited == "first 5 items" and evaluated_items(first, ROOT) == 5
    drawn = Evaluation(tasks=("mmlu",), splits=("dev",), limit=5, limit_seed=1)
    found = scored_examples(drawn, ROOT, "mmlu", "dev")
    assert len(found) == 5 and found == scored_examples(drawn, ROOT, "mmlu", "dev")
    assert found != whole[:5] and [whole.index(e) for e in found] == sorted(map(whole.index, found))
    assert drawn.limited == "5 random items, seed 1"
    assert scored_examples(Evaluation(limit=10**6), ROOT, "mmlu", "dev") == whole
    with pytest.raises(UserError, match=r"limit_seed=1: has no effect with evaluation\.limit=null"):
        effective(resolve([], ["evaluation.limit_seed=1"]))


def test_records_of_a_part_are_others_than_those_of_the_whole() -> None:
    candidate = Candidate(name="student", model=Model.open("zoo/student", dtype="float32"))
    settings = Evaluation(tasks=("mmlu",), splits=("dev",))
    keys = []
    for limit in (None, 5, 6):
        limited = settings.model_copy(update={"limit": limit})
        [records] = wanted_records([candidate], limited, ROOT).values()
        assert len(records.examples) == (limit or 200)
        keys.append(records.key)
    assert len(set(keys)) == 3


def test_all_faults_of_a_folder_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "train.jsonl").write_text('{"question": 1}\n{}\n')
    (tmp_path / "mmlu" / "extrct.jsonl").write_text("")
    scored = ["evaluation.tasks=[mmlu,gsm8k]", "evaluation.splits=[dev,test]"]
    config = resolve([], [f"data.root={tmp_path}", *scored])
    with pytest.raises(UserError) as caught:
        Transfer.of(config, planned=True)
    text = str(caught.value)
    assert text.startswith("data: 6 faults: (1) ")
    for part in (
        "train.jsonl:1: field 'question' must be str, found int (2 such rows)",
        f"{tmp_path}/mmlu: no split 'extract'; did you mean 'extrct'?",
        f"{tmp_path}/mmlu has extrct.jsonl, train.jsonl",
        "no split 'dev'",
        f"{tmp_path}/gsm8k: no such folder; expected one holding dev.jsonl; {tmp_path} has mmlu",
    ):
        assert part in text
    with pytest.raises(UserError, match=r"data\.root=.*no such folder.*has extrct\.jsonl"):
        data_root(str(tmp_path / "mmlu" / "gone"))


def test_a_file_by_its_path_is_a_root_or_a_split(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    shutil.copy(ROOT / "gsm8k" / "extract.jsonl", file)
    root = data_root(str(file))
    assert len(load_split(root, "gsm8k", "test")) == 32
    with pytest.raises(
        UserError, match=r"mine\.jsonl: the file of one split, wanted are gsm8k/dev"
    ):
        check_splits([(root, "gsm8k", "dev"), (root, "gsm8k", "test")])
    config = resolve(
        [],
        ["data.task=gsm8k", f"data.train_split={file}", "evaluation.tasks=[gsm8k]"],
    )
    assert len(Transfer.of(config, planned=True).inputs.train) == 32
