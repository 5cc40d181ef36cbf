"""A task of lm_eval by its name, on local rows: requests, verdicts and metrics are lm_eval's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semalign.config.sections import Sandbox
from semalign.errors import UserError
from semalign.models.loading import load_tokenizer
from semalign.plugins import load_plugins
from semalign.stages.scoring import Generation, judge, requests
from semalign.tasks import TASKS, find_task, load_split
from semalign.tasks.protocols import find_protocol

ROWS = [
    {
        "question": f"What is {n} + {n}?",
        "choices": {"text": [str(2 * n), "a much longer answer"], "label": ["A", "B"]},
        "answerKey": "A" if n else "B",
    }
    for n in range(3)
]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(TASKS, "_things", dict(TASKS))
    monkeypatch.setenv("SEMALIGN_PLUGINS", "")
    (tmp_path / "arc_easy").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "arc_easy" / "test.jsonl").write_text(text)
    (tmp_path / "rows.jsonl").write_text(text)
    return tmp_path


def test_arc_easy_by_its_name(root: Path) -> None:
    name, protocol = "lm_eval:arc_easy", find_protocol("paper")
    examples = load_split(root, name, "test")
    assert examples[1].prompt == "Question: What is 1 + 1?\nAnswer:"
    made = requests(examples, load_tokenizer("zoo/student"), protocol, max_model_len=256)
    assert [len(request.spans) for request in made] == [2, 2, 2]
    answers = [(-1.0, -9.0), (-5.0, -9.0), (-9.0, -8.0)]
    generations = [Generation(choice_scores=pair, greedy=(False, False)) for pair in answers]
    records = judge(examples, made, generations, split="test", protocol=protocol, sandbox=Sandbox())
    assert [record.correct for record in records] == [False, True, False]
    assert [record.extracted for record in records] == ["0", "2", "a much longer answer"]
    # by length the longer answer wins each time: 9 / 20 < 1 / 1
    totals = find_task(name).totals([str(record.metrics) for record in records])
    assert totals == {"acc": pytest.approx(1 / 3), "acc_norm": pytest.approx(1 / 3)}


def test_a_yaml_of_lm_evals_is_a_task_file(root: Path) -> None:
    (root / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n"
        "output_type: generate_until\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices.text[0]}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    load_plugins([str(root / "sums.yaml")])
    protocol = find_protocol("paper")
    (root / "sums").mkdir()
    (root / "rows.jsonl").rename(root / "sums" / "test.jsonl")
    examples = load_split(root, "sums", "test")
    made = requests(examples, load_tokenizer("zoo/student"), protocol, max_model_len=256)
    assert made[0].stop == ("\n", "</s>") and made[0].max_tokens == 8
    outputs = [
        Generation(texts=(text,), token_ids=((0,),), unfinished=(False,))
        for text in ("0\nmore", "3", "4")
    ]
    records = judge(examples, made, outputs, split="test", protocol=protocol, sandbox=Sandbox())
    assert [record.correct for record in records] == [True, False, True]
    assert find_task("sums").metric == "accuracy"


def test_what_is_missing_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"arc_easy: no split 'dev'; expected one of: test"):
        load_split(root, "lm_eval:arc_easy", "dev")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"piqa.*cannot be loaded .* name a root that holds piqa/"):
        load_split(root, "lm_eval:piqa", "validation")
