"""The Python API: what its page shows runs, nothing heavy is imported, names are what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import semalign as sa
from semalign.models.heads import read_lm_head
from tests.reference import alignment as reference

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
LIGHT = """
import sys, time
begin = time.process_time()
import semalign as sa
assert dir(sa)
assert time.process_time() - begin < 0.2
assert not {"torch", "ray", "transformers", "pydantic"} & set(sys.modules), sorted(sys.modules)
"""


def test_importing_it_imports_nothing_else() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


def test_every_public_name_is_there() -> None:
    for name in sa.__all__:
        assert getattr(sa, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'transfr'"):
        sa.transfr  # noqa: B018
    text = PAGE.read_text()
    assert [name for name in sa.__all__ if name not in text] == []


def test_the_map_is_the_papers() -> None:
    bases = sa.semantic_bases("zoo/student")
    found = sa.semantic_map(student="zoo/student", teacher="zoo/teacher")
    heads = read_lm_head("zoo/student"), read_lm_head("zoo/teacher")
    ours, theirs = (reference.semantic_bases(head) for head in heads)
    torch.testing.assert_close(bases.double(), ours, rtol=1e-4, atol=1e-5)
    hidden = torch.randn(3, theirs.shape[0])
    wanted = torch.stack([ours @ (theirs.T @ (h.double() / h.double().norm())) for h in hidden])
    torch.testing.assert_close(found(hidden).double(), wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(sa.UserError, match=r"alignment.map=cosin: did you mean 'cosine'\?"):
        sa.semantic_map(student="zoo/student", teacher="zoo/teacher", map="cosin")


def test_attribution_leads_to_pairs() -> None:
    scores = sa.attribute("zoo/teacher", task="mmlu", limit=4)
    assert len(scores) == 6 and all(score > 0 for score in scores)
    [pair] = sa.pairs("last", scores=scores, student_layers=4)
    assert (pair.teacher, pair.student) == ((5,), 3)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block, on few rows; a transfer and an evaluation without Ray."""
    monkeypatch.chdir(tmp_path)
    [block, *_] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    small = (
        'local=True, data={"train_limit": 16}, training={"epochs": 1}, '
        'evaluation={"tasks": ["mmlu"], "splits": ["dev"]})'
    )
    block = block.replace('task="mmlu", local=True)', f'task="mmlu", {small}')
    block = block.replace(
        'tasks=["mmlu"], local=True)', 'tasks=["mmlu"], splits=["dev"], local=True)'
    )
    names: dict[str, object] = {}
    exec(block, names)
    result, table = names["result"], names["table"]
    assert isinstance(result, sa.TransferResult) and result.adapter is not None
    assert list(result.history.columns)[-1] == "lr" and len(result.history) == 1
    assert set(result.table.index) == {"student", "teacher", "transferred"}
    column = ("dev", "mmlu")
    assert table.loc["adapter", column] == result.table.loc["transferred", column]
    assert result.model().peft_config["default"].r == 16
    assert result.config.training.lr == 3e-4
