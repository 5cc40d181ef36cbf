"""Semantic bases are of the whole head, made once a model; a map takes the shared columns."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from semalign.artifacts.artifact import Workspace, ordered
from semalign.artifacts.host import Host
from semalign.artifacts.local import LocalExecutor, make_all
from semalign.config.sections import Alignment
from semalign.core.alignment import cosine_map
from semalign.core.bases import semantic_bases
from semalign.models.heads import read_lm_head
from semalign.models.loading import load_tokenizer
from semalign.models.reference import Model
from semalign.models.vocabulary import Overlap, vocabulary_overlap
from semalign.stages.bases import Bases
from semalign.stages.mapping import Map
from tests.reference.alignment import semantic_bases as literal_bases


@pytest.fixture(scope="module")
def shared(models: dict[str, Model]) -> Overlap:
    """As if the teacher had 90% of the student's tokens, in another order."""
    tokenizer = load_tokenizer(models["student"].path)
    every = vocabulary_overlap(tokenizer, tokenizer)
    count = len(every.student_ids)
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(count, generator=generator)[: round(0.9 * count)].sort().values
    order = torch.randperm(len(kept), generator=generator)
    return Overlap(
        student_ids=every.student_ids[kept],
        teacher_ids=every.teacher_ids[kept][order],
        fraction=0.9,
        fraction_of_smaller=0.9,
        student_to_teacher=every.student_to_teacher,
    )


def test_bases_are_of_the_whole_head(models: dict[str, Model], tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    bases = Bases(model=models["student"])
    found = Bases.read(LocalExecutor(workspace).make(bases))
    head = read_lm_head(models["student"].path)
    assert found.shape == (32, len(head)) and found.dtype == torch.float32
    torch.testing.assert_close(found, literal_bases(head).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=0), torch.ones(len(head)))
    assert workspace.manifest(bases)["atoms"] == len(head)


@pytest.mark.parametrize("top_k", [None, 7])
def test_a_map_takes_the_shared_columns_of_both_heads(
    models: dict[str, Model], shared: Overlap, tmp_path: Path, top_k: int | None
) -> None:
    mapping = Map(
        student=models["student"],
        teacher=models["teacher"],
        shared=shared,
        alignment=Alignment(top_k=top_k),
    )
    executor = LocalExecutor(Workspace(tmp_path))
    make_all(executor, ordered([mapping]))
    found = Map.read(executor.workspace.place(mapping))
    heads = [read_lm_head(models[name].path) for name in ("student", "teacher")]
    student = semantic_bases(heads[0])[:, shared.student_ids]
    teacher = semantic_bases(heads[1])[:, shared.teacher_ids]
    if top_k is None:
        torch.testing.assert_close(found.matrix, cosine_map(student, teacher).float())
        # an atom does not change because the other model lacks another token
        of_rows = cosine_map(
            semantic_bases(heads[0][shared.student_ids]),
            semantic_bases(heads[1][shared.teacher_ids]),
        )
        h = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
        cosines = torch.cosine_similarity(found(h), h @ of_rows.float().T, dim=1)
        assert 0.8 < cosines.mean() < 0.9999
    else:
        assert found.matrix is None and found.top_k == 7
        torch.testing.assert_close(found.bases_student, student)
        torch.testing.assert_close(found.bases_teacher, teacher)


def test_bases_are_made_once_for_two_pairs_of_models(
    models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = Bases.make

    def counting(self: Bases, folder: Path, host: Host) -> Mapping[str, Any]:
        made.append(self.model.path)
        return make(self, folder, host)

    monkeypatch.setattr(Bases, "make", counting)
    tokenizer = load_tokenizer(models["student"].path)
    every = vocabulary_overlap(tokenizer, tokenizer)
    pairs = [("student", "teacher"), ("teacher", "student"), ("student", "student")]
    maps = [
        Map(student=models[s], teacher=models[t], shared=every, alignment=Alignment())
        for s, t in pairs
    ]
    maps.append(Map(student=models["student"], teacher=models["teacher"], shared=every,
                    alignment=Alignment(top_k=3)))  # fmt: skip
    executor = LocalExecutor(Workspace(tmp_path))
    make_all(executor, ordered(maps))
    assert sorted(made) == sorted(models[name].path for name in ("student", "teacher"))
    assert len({mapping.key for mapping in maps}) == 4


def test_bases_are_of_the_weights_whatever_the_dtype_or_place(
    models: dict[str, Model], tmp_path: Path
) -> None:
    """The head is read as it is stored."""
    shutil.copytree(models["student"].path, tmp_path / "copy")
    others = [
        Model.open(models["student"].path, dtype="bfloat16"),
        Model.open(str(tmp_path / "copy"), dtype="float32"),
    ]
    key = Bases(model=models["student"]).key
    assert all(Bases(model=model).key == key for model in others)
    assert Bases(model=models["teacher"]).key != key


def test_a_map_without_bases_needs_none(
    models: dict[str, Model], shared: Overlap, tmp_path: Path
) -> None:
    dual = Map(
        student=models["student"],
        teacher=models["teacher"],
        shared=shared,
        alignment=Alignment(map="dual"),
    )
    assert ordered([dual]) == [dual]
    executor = LocalExecutor(Workspace(tmp_path))
    executor.make(dual)
    assert not (tmp_path / "bases").exists()
    matrix = Map.read(executor.workspace.place(dual)).matrix
    assert matrix is not None and matrix.shape == (32, 48)
