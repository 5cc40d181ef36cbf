"""The plan counts weights as the models have them, and bytes as the store will."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from semalign.artifacts.artifact import Workspace
from semalign.artifacts.local import LocalExecutor, make_all
from semalign.artifacts.shards import column_bytes
from semalign.config.read import resolve
from semalign.methods import Transfer
from semalign.models.loading import load_config, load_model
from semalign.models.shapes import shape_of
from semalign.plan import Plan, Step, plan_rows, plan_transfer
from semalign.stages.student import CHUNK


def step(plan: Plan, stage: str) -> Step:
    [found] = [step for step in plan.steps if step.stage == stage]
    return found


@pytest.fixture
def small(family: dict[str, Path], tmp_path: Path) -> list[str]:
    models = [f"teacher={family['teacher']}", f"student={family['student']}"]
    return [*models, "data.train_limit=20", f"workdir={tmp_path / 'work'}"]


def plan_of(*overrides: str) -> Plan:
    config = resolve([], overrides)
    return plan_transfer(Transfer.of(config, planned=True), Workspace(config.work))


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_weights_are_counted(family: dict[str, Path], name: str) -> None:
    shape = shape_of(load_config(family[name]))
    model = load_model(family[name], dtype="float32")
    norm = shape.width
    assert shape.weights + norm == sum(p.numel() for p in model.parameters())


def test_known_pairs_give_the_bytes_of_their_columns(small: list[str]) -> None:
    explicit = ["pairing.strategy=explicit", "pairing.explicit=[[2, 3], [3, 2]]"]
    plan = plan_of(*small, *explicit)
    assert plan.pairs is not None and len(plan.pairs) == 2
    config, rows = plan.transfer.config, plan.transfer.inputs.train.positions("all")
    size = column_bytes(rows, config.extraction.shard_examples, 48, "bfloat16")
    assert step(plan, "extract").cost.disk == 2 * size
    upper = plan_of(*small, "attribution.top_n=2")
    assert upper.pairs is None
    stages = [step.stage for step in plan.steps]
    assert [step.stage for step in upper.steps] == ["attribute", *stages]
    for known in plan.steps:
        bound = step(upper, known.stage)
        assert bound.cost.operations >= known.cost.operations
        assert bound.cost.memory >= known.cost.memory


def test_undecided_stages_are_the_dearest_of_all_rankings(small: list[str]) -> None:
    """Against the recipe of every pair of critical layers, each strategy."""
    for strategy in ("attributed", "proportional", "interpolated", "reverse", "cka"):
        plan = plan_of(*small, f"pairing.strategy={strategy}", "attribution.top_n=2")
        recipes = list(plan.transfer.possible())
        for stage in ("extract", "prefix", "train"):
            costs = [a.cost() for recipe in recipes for a in recipe.artifacts if a.stage == stage]
            found = step(plan, stage).cost
            assert found.operations == max(cost.operations for cost in costs)
            assert found.disk == max(cost.disk for cost in costs)
            assert found.memory == max(cost.memory for cost in costs)
        assert plan.trained == max(recipe.result.trained_parameters for recipe in recipes)


def test_what_is_made_costs_nothing(small: list[str]) -> None:
    before = plan_of(*small)
    assert before.pairs is None and not any(step.cached for step in before.steps)
    config = resolve([], small)
    transfer, workspace = Transfer.of(config), Workspace(config.work)
    executor = LocalExecutor(workspace)
    make_all(executor, transfer.first)
    decided = plan_of(*small)
    assert decided.pairs is not None and step(decided, "attribute").cached
    assert not step(decided, "extract").cached
    make_all(executor, transfer.recipe(workspace).artifacts[:-1])
    made = plan_of(*small)
    assert [step.stage for step in made.steps if not step.cached] == ["train", "evaluate"]
    assert step(made, "train") == step(decided, "train")
    assert made.disk == step(made, "train").cost.disk == 0
    head, body = plan_rows(made, {False: 1e9})
    assert body[0][:2] == ["attribute", "cached"] and body[-1][0] == "total"
    assert all(len(row) == len(head) for row in body)


def test_actors_are_those_of_the_settings(small: list[str]) -> None:
    actors = ["extraction.num_actors=3", "extraction.num_gpus=0.5", "training.num_workers=2"]
    engines = ["evaluation.num_engines=2", "evaluation.num_gpus=1"]
    plan = plan_of(*small, *actors, "training.use_gpu=true", *engines,
                   "evaluation.tensor_parallel_size=2", "pairing.strategy=cka")  # fmt: skip
    assert {s.stage: (s.actors, s.gpus) for s in plan.steps} == {
        "attribute": (1, 0.5),
        "similarity": (1, 0.5),
        "extract": (3, 0.5),
        "prefix": (3, 0.5),
        "bases": (1, 0),
        "align": (1, 0),
        "train": (2, 1),
        "evaluate": (2, 2),
    }


@pytest.mark.parametrize("method", ["sft", "sft-all", "logit-kd", "seeking", "laten", "semalign"])
def test_every_method_is_planned(small: list[str], method: str) -> None:
    plan = plan_of(*small, f"method={method}")
    result = next(plan.transfer.possible()).result
    assert plan.trained >= result.trained_parameters > 0
    assert plan.steps[-2].stage == result.stage
    assert plan.operations > 0


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        ([], 0),
        (["loss.gamma=1"], 1),
        (["loss.objective=fisher"], 1),
        (["loss.objective=fisher", "loss.gamma=1"], 2),
    ],
)
def test_the_teachers_logits_are_counted(
    small: list[str], overrides: list[str], terms: int
) -> None:
    """A row's logits of both models, made twice, and one gradient; in memory the rows of both heads
    over the shared tokens, and the logits of a chunk.
    """
    pair = ["training.epochs=1", "pairing.strategy=explicit", "pairing.explicit=[[2, 3]]"]

    def train(*more: str) -> tuple[float, int, int]:
        plan = plan_of(*small, *pair, *more)
        found = step(plan, "train").cost
        rows = sum(plan.transfer.inputs.train.positions("all"))
        return found.operations, found.memory, rows

    operations, memory, rows = train(*overrides)
    plain = train()
    vocabulary, ours, theirs = 640, 32, 48
    logits = rows * vocabulary * (4 * (ours + theirs) + 2 * ours)
    assert operations - plain[0] == terms * logits
    chunk = 6 * 4 * CHUNK * vocabulary
    assert memory - plain[1] == (4 * vocabulary * (ours + theirs) + chunk if terms else 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 9, 10, 333, 4096])
def test_a_column_has_the_size_of_its_files(tmp_path: Path, dtype: str, rows: int) -> None:
    for width in (1, 48, 192):
        sizes = []
        for index, count in enumerate((rows, rows, 1)):
            file = tmp_path / f"{index}.safetensors"
            save_file({"rows": torch.zeros((count, width), dtype=getattr(torch, dtype))}, file)
            sizes.append(file.stat().st_size)
        assert column_bytes((rows, rows, 1), 1, width, dtype) == sum(sizes)
