"""The terms of the loss against literal ones; what has weight zero is not computed; few labels."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from semalign.artifacts.activations import Column
from semalign.artifacts.artifact import Workspace
from semalign.config.sections import Lora
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens
from semalign.models.adapters import trainable_state
from semalign.models.decoder import PassThrough, find_decoder
from semalign.models.heads import read_lm_head
from semalign.models.loading import load_model
from semalign.models.reference import Model
from semalign.stages.adaptation import LoraAdaptation
from semalign.stages.extraction import Activations, Prefix
from semalign.stages.student import SupervisedStudent
from semalign.stages.training import Epoch, train
from semalign.stages.update import Update, supervised_student
from tests.reference import losses as reference
from tests.stages.conftest import stored, with_loss, with_training

CPU = torch.device("cpu")
EXAMPLES = [0, 3, 7]


def run(update: Update, workspace: Workspace) -> tuple[SupervisedStudent, list[Epoch]]:
    student = supervised_student(update, workspace, CPU)
    epochs: list[Epoch] = []
    train(
        student,
        update.training,
        update.seed,
        on_epoch=lambda measured, save: epochs.append(measured),
    )
    return student, epochs


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
    update: Update,
    workspace: Workspace,
    tokens: list[Tokens],
    family: dict[str, Path],
    objective: str,
    positions: str,
) -> None:
    """Against both whole models, example by example, and the losses written out."""
    made = supervised_student(with_loss(update, objective=objective, gamma=0.5), workspace, CPU)
    full = made.supervision = replace(made.supervision, positions=positions)
    if positions == "answer":  # the stores hold all positions
        cut = [_Rows(full.targets[0].readers[0], tokens), _Rows(full.final, tokens)]
        target = replace(full.targets[0], readers=(cut[0],))
        made.supervision = replace(full, targets=[target], final=cut[1])
    sums, counts = made(EXAMPLES), made.counts(EXAMPLES)
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
            aligned = made.supervision.transport(h_teacher[where])[None]
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


def test_several_targets_count_as_their_mean(update: Update, workspace: Workspace) -> None:
    student = supervised_student(update, workspace, CPU)
    (target,) = student.supervision.targets
    opposite = replace(target, weights=(-1.0,))
    sums = []
    for targets in ([target], [opposite], [target, opposite, opposite]):
        student.supervision = replace(student.supervision, targets=targets)
        sums.append(student(EXAMPLES)["alignment"].item())
    assert sums[2] == pytest.approx((sums[0] + 2 * sums[1]) / 3)
    assert sums[0] + sums[1] == pytest.approx(2 * student.counts(EXAMPLES)["alignment"])


class _Rows:
    """A reader's rows at the positions that predict the answer."""

    def __init__(self, reader: object, tokens: list[Tokens]) -> None:
        self.reader, self.tokens = reader, tokens

    def __getitem__(self, example: int) -> Tensor:
        return self.reader[example][self.tokens[example].align_positions("answer")]


@pytest.mark.parametrize("objective", ["fisher", "geometry"])
def test_other_objectives_and_the_divergence_fall(
    update: Update, workspace: Workspace, objective: str
) -> None:
    # random weights say little: their logits differ by 1e-4, so that fisher is about 1e-8
    alpha = 1e7 if objective == "fisher" else 1.0
    changed = with_loss(update, objective=objective, alpha=alpha, beta=0.0, gamma=1.0)
    _, epochs = run(changed, workspace)
    assert set(epochs[0].series) == {"loss", f"{objective}_loss", "kl_divergence", "lr"}
    for name in ("loss", f"{objective}_loss", "kl_divergence"):
        assert epochs[-1].summary()[name] < epochs[0].summary()[name]


def test_geometry_counts_sequences_of_two_tokens_and_more(
    update: Update, workspace: Workspace
) -> None:
    """An unlabelled example has one position that predicts the answer: no geometry."""
    few = replace(with_loss(update, objective="geometry"), labelled=2)
    student = supervised_student(few, workspace, CPU)
    student.supervision = replace(student.supervision, positions="answer")
    assert student.counts([0, 1, 2, 3])["alignment"] == 2
    assert student.counts([2, 3])["alignment"] == 0


class _Poison(nn.Module):
    def forward(self, *_args: object) -> Tensor:
        raise AssertionError("must not run")


def test_what_has_weight_zero_is_not_computed(update: Update, workspace: Workspace) -> None:
    """L_CE alone needs no teacher; L_align alone runs nothing above layer k, and no LM head."""
    alone = replace(with_loss(update, alpha=0.0), map=None, targets=None, teacher=None, shared=None)
    student, epochs = run(alone, workspace)
    assert set(epochs[0].series) == {"loss", "cross_entropy", "lr"}
    assert epochs[-1].summary()["loss"] < epochs[0].summary()["loss"]
    assert student.supervision.targets == () and student.supervision.heads is None

    aligned = replace(with_loss(update, beta=0.0), teacher=None)
    student = supervised_student(aligned, workspace, CPU)
    decoder = find_decoder(student.model)
    assert [isinstance(layer, PassThrough) for layer in decoder.layers] == [True, False, True]
    decoder.model.base_model.model.lm_head = _Poison()
    epochs = []
    train(
        student,
        aligned.training,
        aligned.seed,
        on_epoch=lambda measured, save: epochs.append(measured),
    )
    assert set(epochs[0].series) == {"loss", "cosine_loss", "lr"}
    with_all_layers, _ = run(with_loss(update, beta=1e-30), workspace)
    found, expected = trainable_state(student.model), trainable_state(with_all_layers.model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_divergence_is_zero_for_the_teacher_itself(
    update: Update, workspace: Workspace, tokens: list[Tokens], models: dict[str, Model]
) -> None:
    """Student = teacher: every distribution is already right (float32 store)."""
    same = replace(
        with_loss(update, alpha=0.0, gamma=1.0),
        student=models["teacher"],
        prefix=stored(workspace, models["teacher"], tokens, [Column(1, "input")], Prefix),
    )
    student = supervised_student(same, workspace, CPU)
    sums, counts = student(EXAMPLES), student.counts(EXAMPLES)
    assert sums["divergence"].item() / counts["divergence"] == pytest.approx(0, abs=1e-6)
    assert sums["cross_entropy"].item() / counts["cross_entropy"] > 1


def test_only_labelled_examples_have_cross_entropy(
    update: Update, workspace: Workspace, tokens: list[Tokens]
) -> None:
    every = with_loss(update, gamma=0.5)
    student = supervised_student(replace(every, labelled=2), workspace, CPU)
    whole = supervised_student(every, workspace, CPU)
    sums, counts = student(list(range(10))), student.counts(range(10))
    expected = whole([0, 1])["cross_entropy"].item()
    assert sums["cross_entropy"].item() == pytest.approx(expected, rel=1e-5)
    assert counts["cross_entropy"] == whole.counts([0, 1])["cross_entropy"]
    prompts = sum(example.prompt_length for example in tokens[2:])
    assert counts["divergence"] == sum(len(t.ids) for t in tokens[:2]) + prompts
    assert student([5])["cross_entropy"].item() == 0
    # the prompt's part of the teacher's rows: causal, so the same as with the answer behind it
    [[h]] = student.micro_batch([5]).targets
    torch.testing.assert_close(h, whole.micro_batch([5]).targets[0][0][: len(h)])
    assert len(h) == tokens[5].prompt_length


def test_a_step_without_labels_has_no_cross_entropy(update: Update, workspace: Workspace) -> None:
    """Two labelled of ten in batches of 2: two of five batches have one."""
    _, epochs = run(replace(with_training(update, batch_size=2), labelled=2), workspace)
    for epoch in epochs:
        entropy = epoch.series["cross_entropy"]
        assert sum(math.isnan(value) for value in entropy) == 3
        measured = [value for value in entropy if not math.isnan(value)]
        assert epoch.summary()["cross_entropy"] == pytest.approx(sum(measured) / 2)
        assert all(map(math.isfinite, epoch.series["loss"]))


def test_unlabelled_answers_do_not_leak(
    update: Update, workspace: Workspace, tokens: list[Tokens], models: dict[str, Model]
) -> None:
    """Other answers behind the unlabelled prompts, other stores: the same training."""
    few = replace(with_loss(update, gamma=0.5), labelled=3)
    other = [
        t
        if i < 3
        else replace(t, ids=t.ids[: t.prompt_length] + (7,) * (len(t.ids) - t.prompt_length))
        for i, t in enumerate(tokens)
    ]
    columns = [Column(3, "mlp"), Column(4, "final")]
    swapped = replace(
        few,
        rows=Dataset(other),
        targets=stored(workspace, models["teacher"], other, columns, Activations),
        prefix=stored(workspace, models["student"], other, [Column(1, "input")], Prefix),
    )
    assert swapped.targets.key != few.targets.key and swapped.prefix.key != few.prefix.key
    for a, b in zip(run(few, workspace)[1], run(swapped, workspace)[1], strict=True):
        assert a.series["loss"] == pytest.approx(b.series["loss"], rel=1e-4)


def test_cross_entropy_alone_runs_labelled_examples_only(
    update: Update, workspace: Workspace
) -> None:
    alone = replace(with_loss(update, alpha=0.0), targets=None, labelled=2)
    student = supervised_student(alone, workspace, CPU)
    assert student.useful([5, 1, 8, 0]) == [1, 0]
    aligned = supervised_student(replace(update, labelled=2), workspace, CPU)
    assert aligned.useful([5, 1]) == [5, 1]


def test_one_objective_is_not_another(update: Update) -> None:
    keys = {
        with_loss(update, **changed).key
        for changed in ({}, {"objective": "fisher"}, {"objective": "geometry"}, {"gamma": 0.1})
    }
    assert len({*keys, replace(update, labelled=3).key}) == 5


def test_the_whole_student_says_what_its_layers_say_from_a_store(
    update: Update, workspace: Workspace, models: dict[str, Model], tokens: list[Tokens]
) -> None:
    """Without a prefix store the student is run from its embedding on."""
    prefix = stored(workspace, models["student"], tokens, [Column(0, "input")], Prefix)
    adaptation = LoraAdaptation((0, 1, 2), Lora(rank=4), 0)
    alone = replace(with_loss(update, alpha=0.0), pairs=(), targets=None, map=None)
    whole = replace(alone, adaptation=adaptation)
    both = [
        supervised_student(replace(whole, prefix=source), workspace, CPU)
        for source in (prefix, None)
    ]
    losses = []
    for student in both:
        (loss,) = student([0, 2, 3]).values()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    gradients = [
        {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
        for student in both
    ]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
