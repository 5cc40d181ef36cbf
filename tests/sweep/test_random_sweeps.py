"""The counts of 40 random sweeps against every trial's recipe under every ranking of layers."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from semalign.artifacts.artifact import union
from semalign.core.pairing import STRATEGIES, Pair, pair_layers
from semalign.methods import Recipe, Transfer
from semalign.sweep.file import load_sweep
from semalign.sweep.outcomes import Tally, choice_of, most
from semalign.sweep.plan import plan_sweep
from semalign.sweep.transfers import transfers
from semalign.sweep.trials import trials

TEACHER, STUDENT, TOP = 5, 3, 2
CRITICAL = ("attributed", "proportional", "interpolated", "reverse", "cka")


def random_case(draw: Random) -> dict[str, Any]:
    """Settings that all have an effect."""
    method = draw.choice(["semalign"] * 5 + ["sft", "sft-all", "logit-kd", "seeking", "laten"])
    case: dict[str, Any] = {"method": method}
    if method in ("sft-all", "seeking", "laten"):
        return case
    strategy = draw.choice([*CRITICAL, "last", "random", "explicit"])
    case["pairing.strategy"] = strategy
    if strategy in (*CRITICAL, "random"):
        case["attribution.top_n"] = draw.choice([1, TOP])
    if strategy == "explicit":
        pairs = [[draw.randint(1, TEACHER), student] for student in (1, 2, 3)]
        case["pairing.explicit"] = draw.sample(pairs, draw.choice([1, 2]))
    if method != "semalign":
        return case
    case["loss.alpha"] = draw.choice([0, 0.1, 1])
    case["loss.gamma"] = draw.choice([0, 0, 0.5])
    if case["loss.alpha"]:
        case["extraction.interface"] = draw.choice(["mlp", "attn", "both"])
        case["loss.objective"] = draw.choice(["cosine", "cosine", "fisher", "geometry"])
        if case["loss.objective"] == "cosine":
            case["alignment.map"] = draw.choice(["cosine", "dual"])
    if case["loss.alpha"] or case["loss.gamma"]:
        case["extraction.positions"] = draw.choice(["all", "all", "answer"])
    return case


def random_sweep(number: int) -> dict[str, Any]:
    draw = Random(number)
    cases = {f"case {index}": random_case(draw) for index in range(draw.randint(2, 9))}
    axes: dict[str, Any] = {"variant": {"cases": cases}}
    if draw.random() < 0.4:
        axes["data.task"] = ["mmlu", "gsm8k"]
    if draw.random() < 0.4:
        axes["training.adapter"] = {"cases": {"a": {}, "b": {"data.labelled_limit": 5}}}
    base = draw.choice([{}, {"loss.alpha": 0}, {"extraction.layers": [2]}, {"loss.gamma": 1}])
    return {"base": base, "axes": axes, "seeds": draw.choice([[0], [0, 1]])}


def findings(comparing: bool) -> Iterator[tuple[tuple[int, ...], list[list[float]] | None]]:
    """Every ranking of the critical layers, and of each of them any most similar student layer."""
    for critical in itertools.permutations(range(TEACHER), TOP):
        if not comparing:
            yield critical, None
            continue
        for students in itertools.product(range(STUDENT), repeat=TOP):
            best = dict(zip(critical, students, strict=True))
            yield (
                critical,
                [
                    [float(column == best.get(row, 0)) for column in range(STUDENT)]
                    for row in range(TEACHER)
                ],
            )


def brute_force(found: Sequence[Transfer]) -> Counter[str]:
    """The most of everything, of transfers whose attribution is the same."""

    @functools.cache
    def recipe(transfer: Transfer, pairs: tuple[Pair, ...]) -> Recipe:
        return transfer.method.recipe(transfer.config, transfer.inputs, pairs)

    looks_at = [STRATEGIES[transfer.config.pairing.strategy].looks_at for transfer in found]
    largest: Counter[str] = Counter()
    for critical, similarity in findings(any("similarity" in names for names in looks_at)):
        recipes = []
        for transfer in found:
            config = transfer.config
            pairs = pair_layers(
                config.pairing.strategy,
                num_teacher_layers=TEACHER,
                num_student_layers=STUDENT,
                critical=list(critical[: config.attribution.top_n]),
                seed=config.seed,
                explicit=list(config.pairing.explicit or ()),
                similarity=similarity,
            )
            recipes.append(recipe(transfer, tuple(pairs) if transfer.method.pairs_layers else ()))
        counts = Counter(trainings=len({own.result.key for own in recipes}))
        for artifact in union(artifact for own in recipes for artifact in own.artifacts[:-1]):
            counts[artifact.stage] += max(1, len(artifact.parts))
            counts[f"{artifact.stage} keys"] += 1
        largest |= counts
    return largest


@pytest.mark.parametrize("number", range(40))
def test_counts_are_those_of_a_brute_force(
    number: int, family: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "try.yaml"
    file.write_text(yaml.safe_dump(random_sweep(number)))
    models = [f"{role}={folder}" for role, folder in family.items()]
    small = ["data.train_limit=20", "evaluation.tasks=[mmlu]", "evaluation.splits=[dev, test]"]
    found = trials(load_sweep(file, [*models, *small]))
    read = transfers(found, planned=True)
    once = plan_sweep(found, read).once
    tasks: dict[str, list[Transfer]] = {}
    for transfer in read.values():
        tasks.setdefault(transfer.config.data.task, []).append(transfer)
    largest = [brute_force(own) for own in tasks.values()]
    together: Counter[str] = sum(largest, Counter())  # tasks share no rows
    assert once.columns == together["extract"]
    assert once.extractions == together["extract keys"]
    assert once.prefixes == together["prefix"]
    assert once.trainings == together["trainings"]
    assert once.attributions == together["attribute"]
    maps = {
        artifact.key
        for transfer in read.values()
        for recipe in transfer.possible()
        for artifact in recipe.artifacts
        if artifact.stage == "align"
    }
    assert once.maps == len(maps)


def test_what_is_too_much_to_enumerate_is_bounded() -> None:
    """Three independent rankings of two of 9 layers: 373,248 outcomes, where each needs two."""
    from semalign.methods.method import Outcome

    choices = [
        choice_of(
            Outcome(
                (((ranking, 0), first), ((ranking, 1), second)),
                (Pair((first,), (1.0,), first), Pair((second,), (1.0,), second)),
            )
            for first, second in itertools.permutations(range(9), 2)
        )
        for ranking in range(3)
    ]
    tally = Tally()
    for choice in choices:
        tally.add(choice, [[pair.student for pair in pairs] for pairs in choice.leaves])
    total, [count] = most([tally])
    assert total == count.most == 6 and not count.exact
    few = Tally()
    for choice in choices:
        few.add(choice, [[pair.student // 3 for pair in pairs] for pairs in choice.leaves])
    assert most([few])[0] == 3  # no more than there are
