"""Figure 4's numbers against a literal CKA, and its drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from semalign.analysis import FIGURES, similarity
from semalign.analysis.similarity import compare_layers, drawn_positions, similarity_panels
from semalign.core.bases import semantic_bases as bases_of
from semalign.core.similarity import linear_cka
from semalign.data.tokens import Tokens
from semalign.models.adapters import lora_on_layers, save_adapter
from semalign.models.decoder import find_decoder
from semalign.models.loading import load_model
from semalign.stages.mapping import MAPS, Transport
from tests.analysis.figure_data import (
    similarity_data,
    states_of,
    ticks,
)
from tests.reference import similarity as cka_reference
from tests.reference.alignment import semantic_bases


@pytest.fixture(scope="module")
def compared(
    family: dict[str, Path], tokens: list[Tokens], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Similarity of 40 positions, with an adapter that changes nothing yet."""
    adapter = tmp_path_factory.mktemp("similarity") / "lora"
    lora = lora_on_layers(load_model(family["student"]), [1], rank=2)
    save_adapter(lora, adapter, family["student"])
    teacher, student = load_model(family["teacher"]), load_model(family["student"])
    bases = [bases_of(find_decoder(model).lm_head.weight) for model in (student, teacher)]
    return similarity_panels(
        teacher, student, (tokens, tokens), Transport.build(*bases, MAPS["cosine"]),
        positions=40, batch_size=3, seed=5, adapter=str(adapter),
    )  # fmt: skip


def test_similarity_equals_the_literal_cka(
    family: dict[str, Path], tokens: list[Tokens], compared: dict[str, Any]
) -> None:
    kept = drawn_positions(sum(len(e.ids) for e in tokens), 40, seed=5)
    assert kept.sum() == compared["positions"] == 40
    panels = {panel["name"]: panel for panel in compared["panels"]}
    assert list(panels) == ["before", "after", "trained"]
    bases_student, bases_teacher = (
        semantic_bases(find_decoder(load_model(family[name])).lm_head.weight)
        for name in ("student", "teacher")
    )
    for i, j in ((0, 0), (4, 1), (2, 2)):
        x = states_of(family["teacher"], tokens, "block", i)[kept].double()
        y = states_of(family["student"], tokens, "block", j)[kept].double()
        aligned = torch.stack([bases_student @ (bases_teacher.T @ (h / h.norm())) for h in x])
        for name, rows in (("before", x), ("after", aligned), ("trained", x)):
            exact = cka_reference.linear_cka(rows, y)
            assert panels[name]["exact"][i][j] == pytest.approx(exact, abs=1e-5)
            batch = cka_reference.minibatch_cka([(rows, y)])  # 40 rows are one batch
            assert panels[name]["minibatch"][i][j] == pytest.approx(batch, abs=1e-5)
    for panel in compared["panels"]:
        difference = torch.tensor(panel["exact"]) - torch.tensor(panel["minibatch"])
        assert panel["max_difference"] == pytest.approx(difference.abs().max().item(), abs=1e-6)


def test_exact_and_minibatch_cka_agree_on_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BATCH_ROWS", 300)
    torch.manual_seed(0)
    shared = torch.randn(1100, 6)
    xs = [shared @ torch.randn(6, 8) + torch.randn(1100, 8) for _ in range(2)]
    ys = [shared @ torch.randn(6, 5), torch.randn(1100, 5)]
    found = compare_layers(xs, ys, seed=0)
    assert found["max_difference"] < 0.02
    assert found["exact"][1][0] == pytest.approx(linear_cka(xs[1], ys[0]).item())
    again = compare_layers(xs, ys, seed=0)
    assert again == found


def test_similarity_draws_all_panels_on_one_scale_from_0_to_1() -> None:
    data = similarity_data(names=("before", "after", "trained"))
    figure = FIGURES["similarity"].draw(data)
    *panels, bar = figure.axes
    assert len(panels) == 3 and bar.get_ylabel() == "linear CKA"
    for axes, panel in zip(panels, data["panels"], strict=True):
        [image] = axes.get_images()
        assert image.get_clim() == (0, 1)
        assert image.get_array().tolist() == panel["exact"]
        texts = {(text.get_position(), text.get_text()) for text in axes.texts}
        assert ((1, 2), "0.60") in texts and len(texts) == 6  # student 2, teacher 3
        assert axes.get_title().startswith(panel["name"])
    assert ticks(panels[0]) == ["1", "2"] and ticks(panels[0], "y") == ["1", "2", "3"]
    assert "teacher" in panels[0].get_ylabel() and "student" in panels[0].get_xlabel()
