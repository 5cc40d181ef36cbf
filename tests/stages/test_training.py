"""The single-layer update: against a literal one, resumed, cut across workers, and diverging."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from semalign.artifacts.activations import Column
from semalign.config.sections import Lora
from semalign.core.pairing import Pair
from semalign.data.tokens import Tokens
from semalign.errors import Diverged
from semalign.models.adapters import trainable_state
from semalign.stages.job import TrainJob
from semalign.stages.prepare import build_tail
from semalign.stages.student import StudentTail
from semalign.stages.training import Epoch, global_batches, learning_rate, train
from tests.stages.conftest import make_store, with_loss

CPU = torch.device("cpu")


def run(job: TrainJob, tokens: list[Tokens], **options: object) -> tuple[StudentTail, list[Epoch]]:
    tail = build_tail(job, tokens, CPU)
    epochs: list[Epoch] = []
    train(tail, job.settings, on_epoch=lambda e, save: epochs.append(e), **options)  # type: ignore[arg-type]
    return tail, epochs


def test_both_losses_fall_and_only_layer_k_changes(job: TrainJob, tokens: list[Tokens]) -> None:
    tail, epochs = run(job, tokens)
    assert epochs[-1].summary()["loss"] < epochs[0].summary()["loss"]
    assert epochs[-1].summary()["alignment_cosine"] > epochs[0].summary()["alignment_cosine"]
    assert epochs[-1].summary()["cross_entropy"] < epochs[0].summary()["cross_entropy"]
    names = trainable_state(tail.model)
    assert names and all(".layers.1." in name for name in names)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names} == set(
        Lora().target_modules
    )


@pytest.mark.parametrize("objective", ["cosine", "fisher", "geometry"])
def test_micro_batches_do_not_matter(job: TrainJob, tokens: list[Tokens], objective: str) -> None:
    """Nor for few labels: a micro-batch may have none."""
    some = replace(with_loss(job, objective=objective, gamma=0.5), labelled=4)
    _, small = run(with_loss(some, micro_batch_size=1), tokens)
    _, large = run(with_loss(some, micro_batch_size=4), tokens)
    for a, b in zip(small, large, strict=True):
        assert a.series["loss"] == pytest.approx(b.series["loss"], rel=1e-5)


def test_same_seed_same_adapter(job: TrainJob, tokens: list[Tokens]) -> None:
    states = [trainable_state(run(job, tokens)[0].model) for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resumed_is_the_same_to_the_bit(
    job: TrainJob, tokens: list[Tokens], tmp_path: Path
) -> None:
    undisturbed, _ = run(job, tokens)

    class Killed(Exception):
        pass

    def die_after_first(measured: Epoch, save) -> None:  # type: ignore[no-untyped-def]
        save(tmp_path)
        raise Killed

    with pytest.raises(Killed):
        train(build_tail(job, tokens, CPU), job.settings, on_epoch=die_after_first)
    resumed, epochs = run(job, tokens, resume=tmp_path)
    assert [epoch.epoch for epoch in epochs] == [2, 3]
    expected = trainable_state(undisturbed.model)
    found = trainable_state(resumed.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_loss_that_is_not_finite_names_step_and_examples(
    job: TrainJob, tokens: list[Tokens]
) -> None:
    tail = build_tail(job, tokens, CPU)
    tail.supervision.transport.matrix[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(Diverged, match=r"loss is nan at step 1; examples \S+, "):
        train(tail, job.settings, on_epoch=lambda e, save: None)


def test_whole_layer(job: TrainJob, tokens: list[Tokens]) -> None:
    tail, epochs = run(replace(job, adapter="full"), tokens)
    assert epochs[-1].series["loss"][-1] < epochs[0].series["loss"][0]
    assert all(".layers.1." in name for name in trainable_state(tail.model))


def test_prefix_weights_are_gone(job: TrainJob, tokens: list[Tokens]) -> None:
    model = build_tail(job, tokens, CPU).model
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
def test_bfloat16(job: TrainJob, tokens: list[Tokens], adapter: str) -> None:
    half = replace(job, adapter=adapter, student=replace(job.student, dtype="bfloat16"))
    tail, epochs = run(half, tokens)
    assert epochs[-1].summary()["loss"] < epochs[0].summary()["loss"]
    frozen = {p.dtype for p in tail.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in trainable_state(tail.model).values()} == {torch.float32}


def test_several_layers_and_both_interfaces(
    job: TrainJob, tokens: list[Tokens], family: dict[str, Path], tmp_path: Path
) -> None:
    """Two pairs, attention and MLP: one adapter, four targets, the prefix of the lower layer."""
    columns = [Column(layer, name) for layer in (2, 3) for name in ("attn", "mlp")]
    both = replace(
        job,
        pairs=(Pair((3,), (1.0,), 2), Pair((2, 3), (0.5, 0.5), 1)),
        interfaces=("attn", "mlp"),
        teacher_store=make_store(tmp_path, family["teacher"], tokens, columns, 48),
    )
    tail, epochs = run(both, tokens)
    assert len(tail.supervision.targets) == 4 and tail.supervision.first_layer == 1
    assert {name.split(".layers.")[1][0] for name in trainable_state(tail.model)} == {"1", "2"}
    assert epochs[-1].summary()["alignment_cosine"] > epochs[0].summary()["alignment_cosine"]
