"""The terms of the loss against literal ones; what has weight zero is not computed; few labels."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from semalign.artifacts.activations import Column
from semalign.data.tokens import Tokens
from semalign.models.adapters import trainable_state
from semalign.models.decoder import PassThrough, find_decoder
from semalign.models.heads import read_lm_head
from semalign.models.loading import load_model
from semalign.stages.job import TrainJob
from semalign.stages.prepare import build_tail
from semalign.stages.student import StudentTail
from semalign.stages.training import Epoch, train
from tests.reference import losses as reference
from tests.stages.conftest import make_store, with_loss

CPU = torch.device("cpu")
EXAMPLES = [0, 3, 7]


def run(job: TrainJob, tokens: list[Tokens]) -> tuple[StudentTail, list[Epoch]]:
    tail = build_tail(job, tokens, CPU)
    epochs: list[Epoch] = []
    train(tail, job.settings, on_epoch=lambda measured, save: epochs.append(measured))
    return tail, epochs


@torch.no_grad()
def whole_model(model: nn.Module, ids: tuple[int, ...], layer: int) -> tuple[Tensor, Tensor]:
    """MLP output of a layer (T, D) and logits (T, V) of the untouched model."""
    said: list[Tensor] = []
    hook = model.model.layers[layer].mlp.register_forward_hook(lambda _m, _a, out: said.append(out))
    logits = model(torch.tensor([ids])).logits
    hook.remove()
    return said[0][0], logits[0]


@pytest.mark.parametrize("objective", ["cosine", "fisher", "geometry"])
@pytest.mark.parametrize("positions", ["all", "answer"])
def test_sums_are_the_literal_losses(
    job: TrainJob, tokens: list[Tokens], family: dict[str, Path], objective: str, positions: str
) -> None:
    """Against both whole models, example by example, and the losses written out."""
    tail = build_tail(with_loss(job, objective=objective, gamma=0.5), tokens, CPU)
    tail.settings = replace(tail.settings, positions=positions)
    if positions == "answer":  # the stores hold all positions
        full = tail.supervision
        cut = [_Rows(full.targets[0].readers[0], tokens), _Rows(full.final, tokens)]
        target = replace(full.targets[0], readers=(cut[0],))
        tail.supervision = replace(full, targets=[target], final=cut[1])
    sums, counts = tail(EXAMPLES), tail.counts(EXAMPLES)
    student, teacher = (load_model(family[n], dtype="float32") for n in ("student", "teacher"))
    heads = [read_lm_head(str(family[name])) for name in ("student", "teacher")]
    alignment, entropy, divergence = [], 0.0, 0.0
    for e in EXAMPLES:
        example = tokens[e]
        where = example.align_positions(positions)
        h, z = whole_model(student, example.ids, 1)
        h_teacher, z_teacher = whole_model(teacher, example.ids, 3)
        count = len(h[where])
        if objective == "fisher":
            alignment.append(count * reference.fisher(h[where], h_teacher[where], *heads))
        else:
            aligned = tail.supervision.transport(h_teacher[where])[None]
            literal = (
                reference.cosine_alignment_loss if objective == "cosine" else reference.geometry
            )
            weight = count if objective == "cosine" else 1
            alignment.append(weight * literal(h[where][None], aligned, torch.ones(1, count)))
        omega = list(range(len(example.ids))[example.supervised_positions])
        labels = torch.tensor([[*example.ids[1:], 0]])
        entropy += len(omega) * reference.supervised_cross_entropy(z[None], labels, omega)
        divergence += count * reference.kl_divergence(z[where], z_teacher[where])
    assert sums["alignment"].item() == pytest.approx(sum(alignment), rel=1e-4)
    assert sums["cross_entropy"].item() == pytest.approx(entropy, rel=1e-4)
    assert sums["divergence"].item() == pytest.approx(divergence, rel=1e-4)
    places = sum(len(range(99999)[tokens[e].align_positions(positions)]) for e in EXAMPLES)
    assert counts["divergence"] == places
    assert counts["alignment"] == (len(EXAMPLES) if objective == "geometry" else places)


def test_several_targets_count_as_their_mean(job: TrainJob, tokens: list[Tokens]) -> None:
    tail = build_tail(job, tokens, CPU)
    (target,) = tail.supervision.targets
    opposite = replace(target, weights=(-1.0,))
    sums = []
    for targets in ([target], [opposite], [target, opposite, opposite]):
        tail.supervision = replace(tail.supervision, targets=targets)
        sums.append(tail(EXAMPLES)["alignment"].item())
    assert sums[2] == pytest.approx((sums[0] + 2 * sums[1]) / 3)
    assert sums[0] + sums[1] == pytest.approx(2 * tail.counts(EXAMPLES)["alignment"])


class _Rows:
    """A reader's rows at the positions that predict the answer."""

    def __init__(self, reader: object, tokens: list[Tokens]) -> None:
        self.reader, self.tokens = reader, tokens

    def __getitem__(self, example: int) -> Tensor:
        return self.reader[example][self.tokens[example].align_positions("answer")]


@pytest.mark.parametrize("objective", ["fisher", "geometry"])
def test_other_objectives_and_the_divergence_fall(
    job: TrainJob, tokens: list[Tokens], objective: str
) -> None:
    # random weights say little: their logits differ by 1e-4, so that fisher is about 1e-8
    alpha = 1e7 if objective == "fisher" else 1.0
    _, epochs = run(with_loss(job, objective=objective, alpha=alpha, beta=0.0, gamma=1.0), tokens)
    assert set(epochs[0].series) == {"loss", f"{objective}_loss", "kl_divergence", "lr"}
    for name in ("loss", f"{objective}_loss", "kl_divergence"):
        assert epochs[-1].summary()[name] < epochs[0].summary()[name]


def test_geometry_counts_sequences_of_two_tokens_and_more(
    job: TrainJob, tokens: list[Tokens]
) -> None:
    """An unlabelled example has one position that predicts the answer: no geometry."""
    tail = build_tail(replace(with_loss(job, objective="geometry"), labelled=2), tokens, CPU)
    tail.settings = replace(tail.settings, positions="answer")
    assert tail.counts([0, 1, 2, 3])["alignment"] == 2
    assert tail.counts([2, 3])["alignment"] == 0


class _Poison(nn.Module):
    def forward(self, *_args: object) -> Tensor:
        raise AssertionError("must not run")


def test_what_has_weight_zero_is_not_computed(job: TrainJob, tokens: list[Tokens]) -> None:
    """L_CE alone needs no teacher; L_align alone runs nothing above layer k, and no LM head."""
    alone = replace(with_loss(job, alpha=0.0), transport=None, teacher_store=None, teacher=None)
    tail, epochs = run(alone, tokens)
    assert set(epochs[0].series) == {"loss", "cross_entropy", "lr"}
    assert epochs[-1].summary()["loss"] < epochs[0].summary()["loss"]
    assert tail.supervision.targets == () and tail.supervision.heads is None

    aligned = replace(with_loss(job, beta=0.0), teacher=None)
    tail = build_tail(aligned, tokens, CPU)
    decoder = find_decoder(tail.model)
    assert [isinstance(layer, PassThrough) for layer in decoder.layers] == [True, False, True]
    decoder.model.base_model.model.lm_head = _Poison()
    epochs = []
    train(tail, aligned.settings, on_epoch=lambda measured, save: epochs.append(measured))
    assert set(epochs[0].series) == {"loss", "cosine_loss", "lr"}
    with_all_layers, _ = run(with_loss(job, beta=1e-30), tokens)
    found, expected = trainable_state(tail.model), trainable_state(with_all_layers.model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_divergence_is_zero_for_the_teacher_itself(
    job: TrainJob, tokens: list[Tokens], family: dict[str, Path], tmp_path: Path
) -> None:
    """Student = teacher: every distribution is already right (float32 store)."""
    same = replace(
        with_loss(job, alpha=0.0, gamma=1.0),
        student=job.teacher,
        prefix_store=make_store(tmp_path, family["teacher"], tokens, [Column(1, "input")], 48),
    )
    tail = build_tail(same, tokens, CPU)
    sums, counts = tail(EXAMPLES), tail.counts(EXAMPLES)
    assert sums["divergence"].item() / counts["divergence"] == pytest.approx(0, abs=1e-6)
    assert sums["cross_entropy"].item() / counts["cross_entropy"] > 1


def test_only_labelled_examples_have_cross_entropy(job: TrainJob, tokens: list[Tokens]) -> None:
    few = replace(with_loss(job, gamma=0.5), labelled=2)
    tail, whole = build_tail(few, tokens, CPU), build_tail(with_loss(job, gamma=0.5), tokens, CPU)
    sums, counts = tail(list(range(10))), tail.counts(range(10))
    expected = whole([0, 1])["cross_entropy"].item()
    assert sums["cross_entropy"].item() == pytest.approx(expected, rel=1e-5)
    assert counts["cross_entropy"] == whole.counts([0, 1])["cross_entropy"]
    prompts = sum(example.prompt_length for example in tokens[2:])
    assert counts["divergence"] == sum(len(t.ids) for t in tokens[:2]) + prompts
    assert tail([5])["cross_entropy"].item() == 0
    # the prompt's part of the teacher's rows: causal, so the same as with the answer behind it
    h = tail.supervision.targets[0].rows([5])
    torch.testing.assert_close(h, whole.supervision.targets[0].rows([5])[: len(h)])
    assert len(h) == tokens[5].prompt_length


def test_a_step_without_labels_has_no_cross_entropy(job: TrainJob, tokens: list[Tokens]) -> None:
    """Two labelled of ten in batches of 2: two of five batches have one."""
    _, epochs = run(replace(with_loss(job, batch_size=2), labelled=2), tokens)
    for epoch in epochs:
        entropy = epoch.series["cross_entropy"]
        assert sum(math.isnan(value) for value in entropy) == 3
        measured = [value for value in entropy if not math.isnan(value)]
        assert epoch.summary()["cross_entropy"] == pytest.approx(sum(measured) / 2)
        assert all(map(math.isfinite, epoch.series["loss"]))


def test_unlabelled_answers_do_not_leak(
    job: TrainJob, tokens: list[Tokens], family: dict[str, Path], tmp_path: Path
) -> None:
    """Other answers behind the unlabelled prompts, other stores: the same training."""
    few = replace(with_loss(job, gamma=0.5), labelled=3)
    other = [
        t
        if i < 3
        else replace(t, ids=t.ids[: t.prompt_length] + (7,) * (len(t.ids) - t.prompt_length))
        for i, t in enumerate(tokens)
    ]
    columns = [Column(3, "mlp"), Column(4, "final")]
    swapped = replace(
        few,
        teacher_store=make_store(tmp_path / "t", family["teacher"], other, columns, 48),
        prefix_store=make_store(tmp_path / "s", family["student"], other, [Column(1, "input")], 32),
    )
    for a, b in zip(run(few, tokens)[1], run(swapped, other)[1], strict=True):
        assert a.series["loss"] == pytest.approx(b.series["loss"], rel=1e-4)


def test_cross_entropy_alone_runs_labelled_examples_only(
    job: TrainJob, tokens: list[Tokens]
) -> None:
    alone = replace(with_loss(job, alpha=0.0), teacher_store=None, labelled=2)
    tail = build_tail(alone, tokens, CPU)
    assert tail.useful([5, 1, 8, 0]) == [1, 0]
    assert build_tail(replace(job, labelled=2), tokens, CPU).useful([5, 1]) == [5, 1]


def test_one_objective_is_not_another(job: TrainJob, tokens: list[Tokens]) -> None:
    keys = {
        with_loss(job, **changed).key
        for changed in ({}, {"objective": "fisher"}, {"objective": "geometry"}, {"gamma": 0.1})
    }
    assert len({*keys, replace(job, labelled=3).key}) == 5


def test_the_whole_student_says_what_its_layers_say_from_a_store(
    job: TrainJob, family: dict[str, Path], tokens: list[Tokens], tmp_path: Path
) -> None:
    """Without a prefix store the student is run from its embedding on."""
    prefix = make_store(tmp_path, family["student"], tokens, [Column(0, "input")], 32)
    alone = with_loss(job, alpha=0.0)
    whole = replace(alone, pairs=(), layers=(0, 1, 2), teacher_store=None, transport=None)
    stored = build_tail(replace(whole, prefix_store=prefix), tokens, CPU)
    run = build_tail(replace(whole, prefix_store=None), tokens, CPU)
    losses = []
    for tail in (stored, run):
        (loss,) = tail([0, 2, 3]).values()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    gradients = [
        {name: p.grad for name, p in tail.named_parameters() if p.requires_grad}
        for tail in (stored, run)
    ]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
