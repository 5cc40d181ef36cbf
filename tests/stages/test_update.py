"""An update as an artifact: seeded to the bit, resumed to the bit, named by what decides it."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from semalign import zoo
from semalign.artifacts.artifact import Workspace
from semalign.artifacts.host import Host, Observer
from semalign.artifacts.local import LocalExecutor
from semalign.config.sections import Extraction, Lora, Loss, Seeking, Training
from semalign.core.pairing import Pair
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens, tokenise
from semalign.errors import Diverged
from semalign.methods.seeking.method import SeekingAdaptation, SensitiveFactors
from semalign.models.loading import load_tokenizer
from semalign.models.reference import Model
from semalign.models.vocabulary import vocabulary_overlap
from semalign.stages.adaptation import FullAdaptation, LoraAdaptation
from semalign.stages.training import seeded
from semalign.stages.update import HISTORY, Update, latest_checkpoint
from semalign.tasks import load_split
from tests.stages.conftest import EXTRACTION, with_loss, with_training


class Killed(Exception):
    pass


def dies_in(epoch: int) -> Observer:
    """An observer that is killed before the checkpoint of `epoch` counts."""

    def observe(measured: Any, _keep: Callable[[Path], None]) -> None:
        if measured.epoch == epoch:
            raise Killed

    return observe


def make(
    update: Update, workspace: Workspace, folder: Path, observe: Observer | None = None
) -> dict[str, Any]:
    """Train into a new work folder that has all that the update needs; its manifest."""
    new = Workspace(folder)
    for need in update.needs():
        place = new.path / need.folder
        place.mkdir(parents=True, exist_ok=True)
        if not (place / workspace.place(need).name).exists():
            (place / workspace.place(need).name).symlink_to(workspace.place(need))
    host = Host(new, observe=observe)
    new.ensure(update, lambda target: update.make(target, host))
    return new.manifest(update)


def history(update: Update, folder: Path) -> dict[str, list[float]]:
    place = Workspace(folder).place(update)
    return dict(json.loads((place / HISTORY).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def dropped(update: Update) -> Update:
    """With LoRA's dropout."""
    return replace(update, adaptation=LoraAdaptation((1,), Lora(rank=4, dropout=0.1), 0))


@pytest.fixture(scope="module")
def seeking(tmp_path_factory: pytest.TempPathFactory) -> tuple[Update, Workspace]:
    """All layers of the zoo's student from its teacher's factors, with dropout."""
    workspace = Workspace(tmp_path_factory.mktemp("seeking"))
    student, teacher = (
        Model.open(f"zoo/{name}", dtype="float32") for name in ("student", "teacher")
    )
    tokenizer = load_tokenizer(student.path)
    shared = vocabulary_overlap(tokenizer, load_tokenizer(teacher.path))
    examples = load_split(zoo.path("zoo/data"), "mmlu", "extract")[:6]
    rows = Dataset(tokenise(examples, tokenizer, max_length=256))
    factors = SensitiveFactors(
        teacher=teacher,
        student=student,
        rows=rows,
        shared=shared,
        seeking=Seeking(rank=2, modules=("up_proj", "v_proj"), dropout=0.1),
    )
    LocalExecutor(workspace).make(factors)
    update = Update(
        name="mmlu-seeking",
        student=student,
        rows=rows,
        labelled=None,
        adaptation=SeekingAdaptation(layers=tuple(range(student.layers)), factors=factors),
        loss=Loss(alpha=0.0),
        training=Training(epochs=3, lr=1e-3, batch_size=3, micro_batch_size=3),
        extraction=Extraction(),
        seed=0,
    )
    return update, workspace


@pytest.fixture(params=["lora", "seeking"])
def trained(
    request: pytest.FixtureRequest,
    dropped: Update,
    workspace: Workspace,
    seeking: tuple[Update, Workspace],
) -> tuple[Update, Workspace]:
    return seeking if request.param == "seeking" else (dropped, workspace)


# To the bit


def test_twice_and_resumed_with_dropout_is_the_same_adapter(
    trained: tuple[Update, Workspace], tmp_path: Path
) -> None:
    update, workspace = trained
    folders = [tmp_path / name for name in ("once", "twice", "resumed")]
    torch.manual_seed(1)
    once = make(update, workspace, folders[0])
    torch.manual_seed(2)  # whatever the process has drawn before
    twice = make(update, workspace, folders[1])
    with pytest.raises(Killed):
        make(update, workspace, folders[2], dies_in(2))
    scratch = Workspace(folders[2]).scratch(update)
    checkpoint = latest_checkpoint(scratch)
    assert checkpoint is not None and checkpoint.name == "checkpoint_000001"
    torch.manual_seed(3)
    epochs: list[int] = []
    resumed = make(update, workspace, folders[2], lambda measured, _: epochs.append(measured.epoch))
    assert epochs == [2, 3]
    assert once["sha256"] == twice["sha256"] == resumed["sha256"]
    assert resumed["seconds"] > 0 and resumed["epochs"] == 3
    assert not scratch.exists()
    # the history goes on where it was
    series = [history(update, folder) for folder in folders]
    steps = 3 * -(-len(update.rows) // update.training.batch_size)
    assert len(series[0]["loss"]) == steps
    assert series[0] == series[1] == series[2]


def test_dropout_is_felt_and_is_of_the_seed(
    trained: tuple[Update, Workspace], tmp_path: Path
) -> None:
    update, workspace = trained
    settings = update.adaptation
    if isinstance(settings, SeekingAdaptation):
        factors = settings.factors
        none = replace(
            settings,
            factors=replace(factors, seeking=factors.seeking.model_copy(update={"dropout": 0.0})),
        )
        assert none.factors.key == factors.key  # dropout is of their training alone
    else:
        none = replace(settings, lora=settings.lora.model_copy(update={"dropout": 0.0}))
    without = replace(update, adaptation=none)
    other = replace(update, seed=1)
    assert len({update.key, without.key, other.key}) == 3
    found = [
        make(made, workspace, tmp_path / str(n))["sha256"]
        for n, made in enumerate((update, without, other))
    ]
    assert len(set(found)) == 3


def test_the_random_state_of_the_process_is_its_own(
    trained: tuple[Update, Workspace], tmp_path: Path
) -> None:
    update, workspace = trained
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    make(with_training(update, epochs=1), workspace, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_drawn_is_of_seed_epoch_and_rank() -> None:
    draws = {}
    for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (10, 0, 0)]:
        with seeded(*place):
            draw = torch.rand(4).tolist()
        assert draws.setdefault(place, draw) == draw
    assert len({tuple(draw) for draw in draws.values()}) == 5


def test_a_whole_layer_is_resumed_to_the_bit(
    update: Update, workspace: Workspace, tmp_path: Path
) -> None:
    whole = replace(update, adaptation=FullAdaptation((1,)))
    once = make(whole, workspace, tmp_path / "once")
    with pytest.raises(Killed):
        make(whole, workspace, tmp_path / "resumed", dies_in(3))
    resumed = make(whole, workspace, tmp_path / "resumed")
    assert once["sha256"] == resumed["sha256"] and once["result"] == "student"


def test_checkpoints_are_whole_and_the_last_two_are_kept(
    update: Update, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Update, "publish", dies)
        make(update, workspace, tmp_path)
    scratch = Workspace(tmp_path).scratch(update)
    assert sorted(path.name for path in scratch.iterdir()) == [
        "checkpoint_000002",
        "checkpoint_000003",
    ]
    made: list[int] = []
    manifest = make(update, workspace, tmp_path, lambda measured, _: made.append(measured.epoch))
    assert made == [] and manifest["epochs"] == 3  # all was trained, only to be published


def test_a_checkpoint_of_ray_train_is_none_of_this_process(
    update: Update, workspace: Workspace, tmp_path: Path
) -> None:
    """It lies in the same folder, is named by the time, and may be half there."""
    expected = make(update, workspace, tmp_path / "alone")
    scratch = Workspace(tmp_path / "both").scratch(update)
    half = scratch / "checkpoint_2026-01-01_00-00-00.000000"
    half.mkdir(parents=True)
    (half / "state.pt").write_bytes(b"half")
    assert latest_checkpoint(scratch) is None
    found = make(update, workspace, tmp_path / "both")
    assert found["epochs"] == 3 and found["sha256"] == expected["sha256"]


def test_a_training_lets_go_of_the_models_that_were_held(
    update: Update, workspace: Workspace, tmp_path: Path
) -> None:
    gone: list[bool] = []

    def observe(*_: object) -> None:
        gc.collect()
        gone.append(held() is None)

    host = Host(workspace, observe=observe)
    held = weakref.ref(host.models(update.student)[0])
    assert held() is not None
    try:
        update.make(tmp_path, host)
    finally:
        shutil.rmtree(workspace.scratch(update))
    assert gone == [True] * 3


def test_divergence_names_the_last_good_checkpoint(
    update: Update, workspace: Workspace, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        make(update, workspace, tmp_path, dies_in(2))
    scratch = Workspace(tmp_path).scratch(update)
    state = torch.load(scratch / "checkpoint_000001" / "state.pt", weights_only=True)
    for value in state["trainable"].values():
        value.fill_(torch.nan)
    torch.save(state, scratch / "checkpoint_000001" / "state.pt")
    with pytest.raises(Diverged, match=r"loss is nan .*last good checkpoint: .*checkpoint_000001$"):
        make(update, workspace, tmp_path)
    with pytest.raises(Diverged, match=r"last good checkpoint: none yet$"):
        make(with_training(update, lr=1e30), workspace, tmp_path / "new")


def test_what_is_trained_can_be_kept_after_every_epoch(
    update: Update, workspace: Workspace, tmp_path: Path
) -> None:
    """As it is served, for those who score between epochs; the last is the result."""

    def observe(measured: Any, keep: Callable[[Path], None]) -> None:
        keep(tmp_path / str(measured.epoch))

    make(update, workspace, tmp_path / "work", observe)
    files = [tmp_path / str(epoch) / "adapter" / "adapter_model.safetensors" for epoch in (1, 2, 3)]
    assert len({file.read_bytes() for file in files}) == 3
    result = Workspace(tmp_path / "work").place(update) / "adapter" / files[0].name
    assert result.read_bytes() == files[2].read_bytes()


# Names


def test_the_weights_of_a_mix_are_exact(update: Update) -> None:
    def mixed(share: float) -> str:
        return replace(update, pairs=(Pair((2, 3), (1 - share, share), 1),)).key

    assert len({mixed(0.25), mixed(0.2501), mixed(0.25 + 1e-15), update.key}) == 4


def test_how_it_is_computed_is_no_part_of_the_name(update: Update) -> None:
    hardware = {"num_workers": 4, "use_gpu": True, "cpus_per_worker": 3.0, "max_failures": 9}
    assert with_training(update, **hardware).key == update.key
    stores = Extraction(dtype="float32", shard_examples=9, batch_tokens=7, num_actors=3)
    targets = replace(update.targets, extraction=stores)
    same = replace(update, extraction=stores, targets=targets, name="other")
    assert same.key == update.key and same.label == "other"


def test_what_no_term_looks_at_is_no_part_of_the_name(update: Update) -> None:
    """Nothing of the teacher, the pairs or the map in cross-entropy alone."""
    alone = with_loss(update, alpha=0.0)
    others = [
        replace(alone, pairs=(Pair((2,), (1.0,), 1),)),
        replace(alone, targets=None, teacher=None),
        replace(alone, extraction=EXTRACTION.model_copy(update={"interface": "attn"})),
        replace(alone, extraction=EXTRACTION.model_copy(update={"positions": "answer"})),
        with_loss(alone, objective="geometry"),
    ]
    without_map = replace(alone, map=None)
    assert {replace(other, map=None).key for other in others} == {without_map.key}
    assert without_map.key != update.key
    answer = EXTRACTION.model_copy(update={"positions": "answer"})
    assert replace(update, extraction=answer).key != update.key


def test_tokens_are_not_their_ids_alone(update: Update, tokens: list[Tokens]) -> None:
    moved = [replace(tokens[0], prompt_length=tokens[0].prompt_length - 1), *tokens[1:]]
    assert replace(update, rows=Dataset(moved)).key != update.key
