"""The same model and items through lm_eval's own Hugging Face model and through our engines.

Identical answers item by item: the likeliest choice, the generated text, the verdict. Rows are the
published ones where SEMALIGN_BENCHMARKS names their folder, else the zoo's.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from semalign.artifacts.artifact import Workspace
from semalign.artifacts.records import Record
from semalign.config.sections import Evaluation
from semalign.engine.evaluation import Scored, score_all
from semalign.models.loading import model_folder
from semalign.models.reference import Model
from semalign.stages.judged import Candidate
from semalign.zoo import path as zoo_path

BENCHMARKS = os.environ.get("SEMALIGN_BENCHMARKS")
MODELS = ("zoo/student", "zoo/teacher")
COUNTS = {"mmlu": 200, "gsm8k": 60}
LENGTH = 640  # shorter than some prompts with their answers: the same must be cut off
Sample = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    """Rows spread evenly over each test split."""
    found = {}
    for task, count in COUNTS.items():
        folder = Path(BENCHMARKS) if BENCHMARKS else zoo_path("zoo/data")
        (file,) = (folder / task).glob("test.jsonl*")
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            every = [json.loads(line) for line in lines]
        found[task] = [every[at * len(every) // count] for at in range(count)]
    if not BENCHMARKS:  # of the zoo's subjects lm_eval has no task files
        found["mmlu"] = [row | {"subject": "anatomy"} for row in found["mmlu"]]
    return found


@pytest.fixture(scope="module")
def ours(
    rows: dict[str, list[dict[str, Any]]],
    ray_cluster: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Scored:
    root = tmp_path_factory.mktemp("rows")
    for task, some in rows.items():
        (root / task).mkdir()
        (root / task / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))
    return score_all(
        [Candidate(name=model, model=Model.open(model, dtype="float32")) for model in MODELS],
        Evaluation(
            tasks=tuple(rows),
            splits=("test",),
            protocol="lm-eval",
            max_model_len=LENGTH,
            kv_cache_gb=0.25,
        ),
        root=root,
        workspace=Workspace(tmp_path_factory.mktemp("records")),
    )


def theirs(model: str, tasks: dict[str, Any], max_length: int) -> dict[str, list[Sample]]:
    """The samples that lm_eval logs, by task: greedy, float32, one item at a time."""
    from lm_eval.evaluator import evaluate as evaluate_by_lm_eval
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=str(model_folder(model)),
        dtype="float32",
        batch_size=1,
        device="cpu",
        max_length=max_length,
    )
    done = evaluate_by_lm_eval(lm=lm, task_dict={"tasks": tasks, "groups": {}}, bootstrap_iters=0)
    found: dict[str, list[Sample]] = done["samples"]
    return found


def stock(relative: str, rows: Sequence[dict[str, Any]]) -> Any:
    """A task of lm_eval's own files over the given rows."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / relative)
    splits = dict.fromkeys(("train", "dev", "test"), Dataset.from_list(list(rows)))
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: splits})


@pytest.mark.parametrize("model", MODELS)
def test_mmlu_is_answered_alike(
    model: str, rows: dict[str, list[dict[str, Any]]], ours: Scored
) -> None:
    subjects: dict[str, list[int]] = {}
    for index, row in enumerate(rows["mmlu"]):
        subjects.setdefault(row["subject"], []).append(index)
    tasks = {
        subject: stock(f"mmlu/default/mmlu_{subject}.yaml", [rows["mmlu"][at] for at in mine])
        for subject, mine in subjects.items()
    }
    # vLLM needs room for one token more than it reads; so does lm_eval's own model for it.
    samples = theirs(model, tasks, LENGTH - 1)
    records = ours.records[model, "mmlu", "test"]
    assert any(record.truncated for record in records) == bool(BENCHMARKS)
    furthest, closest, seen = 0.0, float("inf"), 0
    for subject, mine in subjects.items():
        for sample in samples[subject]:
            record = records[mine[sample["doc_id"]]]
            scores = [score for score, _ in sample["filtered_resps"]]
            best = max(range(4), key=scores.__getitem__)
            assert record.extracted == "ABCD"[best], (record.id, scores, record.choice_scores)
            assert record.correct == bool(sample["acc"])
            pairs = zip(scores, record.choice_scores or [], strict=True)
            furthest = max(furthest, *(abs(one - other) for one, other in pairs))
            closest = min(closest, scores[best] - sorted(scores)[-2])
            seen += 1
    assert seen == len(records) == COUNTS["mmlu"]
    print(f"{model} mmlu: {seen} equal; scores within {furthest:.1e}, closest call {closest:.1e}")
    assert furthest < 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_gsm8k_is_written_and_judged_alike(
    model: str, rows: dict[str, list[dict[str, Any]]], ours: Scored
) -> None:
    task = stock("gsm8k/gsm8k-cot-zeroshot.yaml", rows["gsm8k"])
    samples = theirs(model, {"gsm8k": task}, LENGTH)["gsm8k"]
    counted = [sample for sample in samples if sample["filter"] == "flexible-extract"]
    records: list[Record] = ours.records[model, "gsm8k", "test"]
    assert any(record.truncated for record in records) == bool(BENCHMARKS)
    assert len(counted) == len(records) == COUNTS["gsm8k"]
    for sample in counted:
        record, (found,) = records[sample["doc_id"]], sample["filtered_resps"]
        assert record.output == sample["resps"][0][0], record.id
        assert (record.extracted or "[invalid]") == found
        assert record.correct == bool(sample["exact_match"])
    right = sum(record.correct for record in records)
    print(f"{model} gsm8k: {len(records)} equal, {right} right")
