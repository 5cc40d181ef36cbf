"""Figure 2's numbers against literal formulas and theory, and its drawing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from semalign.analysis import FIGURES
from semalign.analysis.artifact import DrawnFigure
from semalign.analysis.decomposition import (
    decomposition_maps,
    isotropic_cosine,
    recomposition_cosines,
    tight_frame_cosine,
)
from semalign.analysis.inputs import load_figure_inputs
from semalign.config.jobs import AnalysisJob
from semalign.config.read import resolve
from semalign.data.tokens import Tokens
from semalign.models.decoder import find_decoder
from semalign.models.loading import load_model
from tests.analysis.figure_data import (
    decomposition_data,
    lines,
    short,
    states_of,
    ticks,
)
from tests.reference import decomposition as reference


def test_decomposition_equals_the_literal_one(
    family: dict[str, Path], tokens: list[Tokens]
) -> None:
    few, path = short(tokens), family["student"]
    model = load_model(path)
    data = recomposition_cosines(model, few, batch_size=2, seed=7)
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
    states = {place: states_of(path, few, name, layer) for place, (layer, name) in places.items()}
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
    matrix = decomposition_maps(head, head, seed=3)["random", "cosine"]
    states = torch.randn(400, width)
    measured = torch.cosine_similarity(states, states @ matrix.T).mean().item()
    theory = tight_frame_cosine(width, atoms)
    assert measured == pytest.approx(theory, abs=0.02)
    assert measured == pytest.approx(isotropic_cosine(matrix), abs=0.02)
    assert theory > 0.5


def test_the_shipped_models_meet_the_theory_and_lose_nothing_under_the_dual_map() -> None:
    job = resolve([], ["limit=4"], AnalysisJob)
    data = DrawnFigure(job=job, inputs=load_figure_inputs(job)).measured([load_model(job.model)])
    assert data["random_theory"] == pytest.approx((1 + 128 / 640) ** -0.5)
    for curve in data["curves"]:
        if curve["map"] == "dual":
            assert curve["low"] == pytest.approx([1.0] * 5, abs=1e-5)
            assert curve["isotropic"] == pytest.approx(1.0, abs=1e-5)
        elif curve["bases"] == "random":
            assert curve["mean"] == pytest.approx([data["random_theory"]] * 5, abs=0.02)


def test_decomposition_draws_every_curve_and_the_theory() -> None:
    data = decomposition_data()
    cosine, dual = FIGURES["decomposition"].draw(data).axes
    assert ticks(cosine) == ["1", "2", "3", "norm"]
    for axes, how in ((cosine, "cosine"), (dual, "dual")):
        for curve in (c for c in data["curves"] if c["map"] == how):
            assert ([0, 1, 2], curve["mean"][:3]) in lines(axes)
            assert ([3], curve["mean"][3:]) in lines(axes)
    assert ([0, 1], [0.894, 0.894]) in lines(cosine)
    low, high = cosine.get_ylim()
    assert low == 0 and high > 1  # the paper's zero is on the axis
    assert "theory" in str(cosine.get_legend_handles_labels()[1])
