"""The single-layer update: against a literal one, resumed, cut across workers, and diverging."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from semalign.artifacts.activations import Column
from semalign.artifacts.artifact import Workspace
from semalign.config.sections import Extraction, Lora
from semalign.core.pairing import Pair
from semalign.data.tokens import Tokens
from semalign.errors import Diverged
from semalign.models.adapters import trainable_state
from semalign.models.reference import Model
from semalign.stages.adaptation import FullAdaptation, LoraAdaptation
from semalign.stages.extraction import Activations
from semalign.stages.student import SupervisedStudent
from semalign.stages.training import Epoch, global_batches, learning_rate, train
from semalign.stages.update import Update, supervised_student
from tests.stages.conftest import stored, with_loss, with_training

CPU = torch.device("cpu")


def run(
    update: Update, workspace: Workspace, **options: object
) -> tuple[SupervisedStudent, list[Epoch]]:
    student = supervised_student(update, workspace, CPU)
    epochs: list[Epoch] = []
    train(
        student,
        update.training,
        update.seed,
        on_epoch=lambda e, save: epochs.append(e),
        **options,  # type: ignore[arg-type]
    )
    return student, epochs


def test_both_losses_fall_and_only_layer_k_changes(update: Update, workspace: Workspace) -> None:
    student, epochs = run(update, workspace)
    assert epochs[-1].summary()["loss"] < epochs[0].summary()["loss"]
    assert epochs[-1].summary()["alignment_cosine"] > epochs[0].summary()["alignment_cosine"]
    assert epochs[-1].summary()["cross_entropy"] < epochs[0].summary()["cross_entropy"]
    names = trainable_state(student.model)
    assert names and all(".layers.1." in name for name in names)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names} == set(
        Lora().target_modules
    )


@pytest.mark.parametrize("objective", ["cosine", "fisher", "geometry"])
def test_micro_batches_do_not_matter(update: Update, workspace: Workspace, objective: str) -> None:
    """Nor for few labels: a micro-batch may have none."""
    some = replace(with_loss(update, objective=objective, gamma=0.5), labelled=4)
    _, small = run(with_training(some, micro_batch_size=1), workspace)
    _, large = run(with_training(some, micro_batch_size=4), workspace)
    for a, b in zip(small, large, strict=True):
        assert a.series["loss"] == pytest.approx(b.series["loss"], rel=1e-5)


def test_same_seed_same_adapter(update: Update, workspace: Workspace) -> None:
    states = [trainable_state(run(update, workspace)[0].model) for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resumed_is_the_same_to_the_bit(
    update: Update, workspace: Workspace, tmp_path: Path
) -> None:
    undisturbed, _ = run(update, workspace)

    class Killed(Exception):
        pass

    def die_after_first(measured: Epoch, save) -> None:  # type: ignore[no-untyped-def]
        save(tmp_path)
        raise Killed

    with pytest.raises(Killed):
        train(
            supervised_student(update, workspace, CPU),
            update.training,
            update.seed,
            on_epoch=die_after_first,
        )
    resumed, epochs = run(update, workspace, resume=tmp_path)
    assert [epoch.epoch for epoch in epochs] == [2, 3]
    expected = trainable_state(undisturbed.model)
    found = trainable_state(resumed.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_loss_that_is_not_finite_names_step_and_examples(
    update: Update, workspace: Workspace
) -> None:
    student = supervised_student(update, workspace, CPU)
    student.supervision.transport.matrix[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(Diverged, match=r"loss is nan at step 1; examples \S+, "):
        train(student, update.training, update.seed, on_epoch=lambda e, save: None)


def test_whole_layer(update: Update, workspace: Workspace) -> None:
    student, epochs = run(replace(update, adaptation=FullAdaptation((1,))), workspace)
    assert epochs[-1].series["loss"][-1] < epochs[0].series["loss"][0]
    assert all(".layers.1." in name for name in trainable_state(student.model))


def test_prefix_weights_are_gone(update: Update, workspace: Workspace) -> None:
    model = supervised_student(update, workspace, CPU).model
    assert not [
        name for name, _ in model.named_parameters() if ".layers.0." in name or "embed" in name
    ]


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(s, 100, peak=1.0, warmup_ratio=0.03) for s in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[3] == 1.0
    assert rates[-1] == pytest.approx(1 / 97)


def test_batches_cover_the_epoch_and_differ_by_epoch() -> None:
    examples = [Tokens(str(n), (1, 2), 1) for n in range(10)]
    first = list(global_batches(examples, 4, seed=1, epoch=0))
    assert sorted(e for batch in first for e in batch) == list(range(10))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert first != list(global_batches(examples, 4, seed=1, epoch=1))
    assert first == list(global_batches(examples, 4, seed=1, epoch=0))


def test_the_labelled_are_spread_over_the_epoch() -> None:
    examples = [Tokens(str(n), (1, 2) if n < 10 else (1,), 1) for n in range(40)]
    batches = list(global_batches(examples, 8, seed=1, epoch=0))
    assert sorted(e for batch in batches for e in batch) == list(range(40))
    assert [sum(e < 10 for e in batch) for batch in batches] == [2] * 5
    assert batches != list(global_batches(examples, 8, seed=2, epoch=0))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_bfloat16(update: Update, workspace: Workspace, adapter: str) -> None:
    adaptation = FullAdaptation((1,)) if adapter == "full" else update.adaptation
    half = replace(update, adaptation=adaptation, student=replace(update.student, dtype="bfloat16"))
    student, epochs = run(half, workspace)
    assert epochs[-1].summary()["loss"] < epochs[0].summary()["loss"]
    frozen = {p.dtype for p in student.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in trainable_state(student.model).values()} == {torch.float32}


def test_several_layers_and_both_interfaces(
    update: Update, workspace: Workspace, models: dict[str, Model], tokens: list[Tokens]
) -> None:
    """Two pairs, attention and MLP: one adapter, four targets, the prefix of the lower layer."""
    columns = [Column(layer, name) for layer in (2, 3) for name in ("attn", "mlp")]
    both = replace(
        update,
        pairs=(Pair((3,), (1.0,), 2), Pair((2, 3), (0.5, 0.5), 1)),
        adaptation=LoraAdaptation((1, 2), Lora(rank=4), 0),
        extraction=Extraction(interface="both"),
        targets=stored(workspace, models["teacher"], tokens, columns, Activations),
    )
    student, epochs = run(both, workspace)
    assert len(student.supervision.targets) == 4 and student.supervision.first_layer == 1
    assert {name.split(".layers.")[1][0] for name in trainable_state(student.model)} == {"1", "2"}
    assert epochs[-1].summary()["alignment_cosine"] > epochs[0].summary()["alignment_cosine"]
