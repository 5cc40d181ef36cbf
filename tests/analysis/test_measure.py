"""The figures' numbers against literal formulas, whole-model passes and theory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from semalign.analysis import measure as analyze
from semalign.analysis.inputs import load_inputs
from semalign.config.jobs import AnalysisJob
from semalign.config.read import resolve
from semalign.core.similarity import linear_cka
from semalign.data.tokens import Tokens
from semalign.errors import UserError
from semalign.models.adapters import lora_on_layers, save_adapter
from semalign.models.decoder import capture, find_decoder, run_base
from semalign.models.loading import load_model
from semalign.stages.attribution import attribute
from semalign.stages.mapping import Transport
from tests.reference import decomposition as reference
from tests.reference import similarity as cka_reference
from tests.reference.alignment import semantic_bases


def said(path: Path, tokens: list[Tokens], interface: str, layer: int) -> torch.Tensor:
    """What a layer says at all positions, one example at a time."""
    decoder = find_decoder(load_model(path))
    rows = []
    for example in tokens:
        ids = torch.tensor([example.ids])
        with torch.no_grad(), capture(decoder, [(layer, interface)]) as seen:
            run_base(decoder, ids, torch.ones_like(ids))
        rows.append(seen[layer, interface][0])
    return torch.cat(rows)


def short(tokens: list[Tokens]) -> list[Tokens]:
    """Few examples of unequal length."""
    return [Tokens(e.id, e.ids[: 5 + 2 * i], 1) for i, e in enumerate(tokens[:3])]


def test_decomposition_equals_the_literal_one(
    family: dict[str, Path], tokens: list[Tokens]
) -> None:
    few, path = short(tokens), family["student"]
    model = load_model(path)
    data = analyze.decomposition(model, few, batch_size=2, seed=7)
    assert data["states"] == ["1", "2", "3", "norm"]
    assert data["positions"] == 5 + 7 + 9
    decoder = find_decoder(model)
    head, embedding = decoder.lm_head.weight, decoder.embed.weight
    drawn = torch.randn(head.shape, generator=torch.Generator().manual_seed(7))
    atoms = {
        "output": reference.output_atoms(head),
        "input": list(embedding.double()),
        "random": list(drawn.double()),
    }
    places = {1: (1, "block"), 3: (2, "final")}
    states = {place: said(path, few, name, layer) for place, (layer, name) in places.items()}
    assert len(data["curves"]) == 6
    for curve in data["curves"]:
        for place, rows in states.items():
            found = reference.cosines(list(rows), atoms[curve["bases"]], curve["map"])
            expected = torch.tensor(found)
            assert curve["mean"][place] == pytest.approx(expected.mean().item(), abs=1e-5)
            spread = expected.std(correction=0).item()
            assert curve["std"][place] == pytest.approx(spread, abs=1e-5)
            assert curve["low"][place] == pytest.approx(sorted(found)[1], abs=1e-5)
            assert curve["high"][place] == pytest.approx(sorted(found)[19], abs=1e-5)


@pytest.mark.parametrize(("width", "atoms"), [(128, 512), (192, 640), (128, 64), (256, 4096)])
def test_random_atoms_are_nearly_a_tight_frame(width: int, atoms: int) -> None:
    """The paper expects 0; theory and measurement agree on another number."""
    torch.manual_seed(0)
    head = torch.randn(atoms, width)
    matrix = analyze.decomposition_maps(head, head, seed=3)["random", "cosine"]
    states = torch.randn(400, width)
    measured = torch.cosine_similarity(states, states @ matrix.T).mean().item()
    theory = analyze.tight_frame_cosine(width, atoms)
    assert measured == pytest.approx(theory, abs=0.02)
    assert measured == pytest.approx(analyze.isotropic_cosine(matrix), abs=0.02)
    assert theory > 0.5


def test_the_shipped_models_meet_the_theory_and_lose_nothing_under_the_dual_map() -> None:
    job = resolve([], ["limit=4"], AnalysisJob)
    data = analyze.measure(job, load_inputs(job), load_model)
    assert data["random_theory"] == pytest.approx((1 + 128 / 640) ** -0.5)
    for curve in data["curves"]:
        if curve["map"] == "dual":
            assert curve["low"] == pytest.approx([1.0] * 5, abs=1e-5)
            assert curve["isotropic"] == pytest.approx(1.0, abs=1e-5)
        elif curve["bases"] == "random":
            assert curve["mean"] == pytest.approx([data["random_theory"]] * 5, abs=0.02)


@pytest.fixture(scope="module")
def compared(
    family: dict[str, Path], tokens: list[Tokens], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Similarity of 40 positions, with an adapter that changes nothing yet."""
    adapter = tmp_path_factory.mktemp("similarity") / "lora"
    lora = lora_on_layers(load_model(family["student"]), [1], rank=2)
    save_adapter(lora, adapter, family["student"])
    teacher, student = load_model(family["teacher"]), load_model(family["student"])
    heads = find_decoder(student).lm_head.weight, find_decoder(teacher).lm_head.weight
    return analyze.similarity(
        teacher, student, (tokens, tokens), Transport.build(*heads, map="cosine"),
        positions=40, batch_size=3, seed=5, adapter=str(adapter),
    )  # fmt: skip


def test_similarity_equals_the_literal_cka(
    family: dict[str, Path], tokens: list[Tokens], compared: dict[str, Any]
) -> None:
    kept = analyze.drawn_positions(sum(len(e.ids) for e in tokens), 40, seed=5)
    assert kept.sum() == compared["positions"] == 40
    panels = {panel["name"]: panel for panel in compared["panels"]}
    assert list(panels) == ["before", "after", "trained"]
    bases_student, bases_teacher = (
        semantic_bases(find_decoder(load_model(family[name])).lm_head.weight)
        for name in ("student", "teacher")
    )
    for i, j in ((0, 0), (4, 1), (2, 2)):
        x = said(family["teacher"], tokens, "block", i)[kept].double()
        y = said(family["student"], tokens, "block", j)[kept].double()
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
    monkeypatch.setattr(analyze, "_BATCH_ROWS", 300)
    torch.manual_seed(0)
    shared = torch.randn(1100, 6)
    xs = [shared @ torch.randn(6, 8) + torch.randn(1100, 8) for _ in range(2)]
    ys = [shared @ torch.randn(6, 5), torch.randn(1100, 5)]
    found = analyze.compare(xs, ys, seed=0)
    assert found["max_difference"] < 0.02
    assert found["exact"][1][0] == pytest.approx(linear_cka(xs[1], ys[0]).item())
    again = analyze.compare(xs, ys, seed=0)
    assert again == found


def test_attribution_has_a_curve_a_granularity_and_aggregation(
    family: dict[str, Path], tokens: list[Tokens]
) -> None:
    few = short(tokens)
    model = load_model(family["teacher"])
    curves = analyze.attribution(model, few, batch_size=2)["curves"]
    assert len({(curve["granularity"], curve["aggregation"]) for curve in curves}) == 6
    for curve in curves:
        how = {name: curve[name] for name in ("granularity", "aggregation")}
        expected = attribute(model, few, batch_size=2, **how)
        assert curve["scores"] == pytest.approx(expected)
        total = sum(abs(score) for score in expected)
        assert curve["share"] == pytest.approx([score / total for score in expected])
        top = max(range(5), key=lambda layer: abs(expected[layer]))
        assert curve["critical"] == top + 1
    signed = next(c for c in curves if (c["granularity"], c["aggregation"]) == ("block", "sum"))
    # the final norm takes the scale away, so no gradient lies along the last layer's output
    assert abs(signed["share"][-1]) < 1e-2
    assert analyze.shares([0.0, 0.0]) == [0.0, 0.0]


def test_the_key_names_what_determines_the_figure() -> None:
    def key(*overrides: str) -> str:
        return load_inputs(resolve([], ["limit=2", *overrides], AnalysisJob)).key

    base = key()
    assert key("batch_size=1") == key("num_cpus=2") == key("figure=decomposition") == base
    others = [key(text) for text in ("seed=1", "limit=3", "dtype=bfloat16", "model=zoo/teacher")]
    similarity = [
        key("figure=similarity", text)
        for text in ("seed=0", "positions=8", "alignment.map=dual", "student=zoo/teacher")
    ]
    assert len({base, *others, *similarity, key("figure=attribution")}) == 10


def test_a_key_the_figure_does_not_use_is_refused() -> None:
    job = resolve([], ["figure=attribution", "student=zoo/teacher"], AnalysisJob)
    with pytest.raises(UserError, match=r"student: figure=attribution does not use it; .* teacher"):
        load_inputs(job)
