"""What the methods that train paired layers have in common: SemAlign and two of its controls."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from semalign.artifacts.activations import Column
from semalign.artifacts.artifact import Artifact, Json, ordered
from semalign.config.jobs import Config
from semalign.config.sections import Alignment, Attribution, Extraction
from semalign.core.attribution import critical_layers
from semalign.core.losses import OBJECTIVES
from semalign.core.pairing import STRATEGIES, Pair, code_index, pair_layers
from semalign.errors import UserError
from semalign.methods.inputs import Inputs, labelled
from semalign.methods.method import MOST_OUTCOMES, Method, Outcome, Recipe
from semalign.models.support import check_lora
from semalign.stages.adaptation import adaptation
from semalign.stages.attribution import LayerScores
from semalign.stages.extraction import Activations, Prefix
from semalign.stages.mapping import MAPS, Map
from semalign.stages.similarity import Similarity
from semalign.stages.supervision import interfaces, teacher_columns, uses_heads, uses_map
from semalign.stages.update import Update

OTHER_METHODS = ("seeking", "laten")  # sections that only the methods of that name read


class Paired(Method):
    """Attribute, pair, extract, and train the paired student layers."""

    pairs_layers = True
    aligns: ClassVar[bool] = True  # whether there may be an alignment term

    def effective(self, config: Config) -> Config:
        OBJECTIVES.find(config.loss.objective, "loss.objective")
        kind = MAPS.find(config.alignment.map, "alignment.map")
        if config.alignment.top_k is not None and not kind.uses_bases:
            raise UserError(
                "alignment.top_k: chooses among Eq. 1's coefficients, which "
                f"alignment.map={config.alignment.map} does not make; expected map=cosine"
            )
        return config

    def unused(self, config: Config) -> Mapping[str, str]:
        decider = f"method={config.method}"
        return {
            **dict.fromkeys(OTHER_METHODS, decider),
            **_unused_by_loss(config, "loss.alpha=0" if self.aligns else decider),
            **_unused_by_pairing(config),
            **({"training.lora": "training.adapter=full"} if self.rank(config) is None else {}),
        }

    def rank(self, config: Config) -> int | None:
        return config.training.lora.rank if config.training.adapter == "lora" else None

    def check(self, config: Config, inputs: Inputs) -> None:
        if config.training.adapter != "lora":
            return
        modules = config.training.lora.target_modules
        try:
            check_lora(inputs.student, tuple(range(inputs.student.layers)), modules)
        except UserError:  # not all layers need to be alike: those that may be paired
            found = {
                pair.student for outcome in self.outcomes(config, inputs) for pair in outcome.pairs
            }
            check_lora(inputs.student, tuple(sorted(found)), modules)

    def first(self, config: Config, inputs: Inputs) -> tuple[Artifact, ...]:
        looks_at = STRATEGIES.find(config.pairing.strategy, "pairing.strategy").looks_at
        found: list[Artifact] = []
        if "critical" in looks_at:
            found.append(_scores(inputs, config.attribution))
        if "similarity" in looks_at:
            found.append(_similarity(inputs))
        return tuple(found)

    def pairs(self, config: Config, inputs: Inputs, first: Sequence[Path]) -> tuple[Pair, ...]:
        top_n = config.attribution.top_n
        critical: Sequence[int] = range(top_n)  # where only their number counts
        similarity = None
        for artifact, folder in zip(self.first(config, inputs), first, strict=True):
            if isinstance(artifact, LayerScores):
                critical = critical_layers(artifact.read(folder), top_n)
            elif isinstance(artifact, Similarity):
                similarity = artifact.read(folder)
        return _pairs(config, inputs, critical, similarity)

    def outcomes(self, config: Config, inputs: Inputs) -> Iterator[Outcome]:
        """Of every ranking of the critical layers; a layer's most similar one may be any."""
        keys = {type(artifact): artifact.key for artifact in self.first(config, inputs)}
        scored, compared = keys.get(LayerScores), keys.get(Similarity)
        layers, top_n = inputs.teacher.layers, config.attribution.top_n
        ours = inputs.student.layers
        most = MOST_OUTCOMES // (2 * ours) if compared else MOST_OUTCOMES
        orders = rankings(layers, top_n, most) if scored else [tuple(range(min(top_n, layers)))]
        choices = similar(ours, top_n, MOST_OUTCOMES // len(orders)) if compared else [()]
        for critical in orders:
            ranked = [((scored, place), layer) for place, layer in enumerate(critical)]
            for students in choices:
                nearest = dict(zip(critical, students, strict=False))
                alike = [((compared, layer), student) for layer, student in nearest.items()]
                similarity = _peaks(nearest, layers, ours) if compared else None
                yield Outcome(
                    (*(ranked if scored else ()), *alike),
                    _pairs(config, inputs, critical, similarity),
                )

    def pairs_settings(self, config: Config) -> Json:
        pairing = config.pairing
        looks_at = STRATEGIES.find(pairing.strategy, "pairing.strategy").looks_at
        return [
            pairing.strategy,
            config.attribution.top_n,
            pairing.explicit if "explicit" in looks_at else None,
            config.seed if "seed" in looks_at else None,
        ]

    def recipe(self, config: Config, inputs: Inputs, pairs: tuple[Pair, ...]) -> Recipe:
        loss, extraction = config.loss, config.extraction
        columns = teacher_columns(
            pairs,
            loss,
            interfaces(extraction),
            num_layers=inputs.teacher.layers,
            extra_layers=[code_index(number) for number in extraction.layers],
        )
        targets = _targets(inputs, extraction, frozenset(columns))
        layers = sorted({pair.student for pair in pairs})
        prefix = _prefix(inputs, extraction, config.dtype, layers[0])
        mapping = _map(inputs, config.alignment) if uses_map(loss) else None
        update = Update(
            name=f"{config.data.task}-{config.method}",
            student=inputs.student,
            rows=inputs.train,
            labelled=labelled(config, inputs.train),
            adaptation=adaptation(
                config.training.adapter, layers, config.training.lora, config.seed
            ),
            loss=loss,
            training=config.training,
            extraction=extraction,
            seed=config.seed,
            pairs=pairs,
            prefix=prefix,
            teacher=inputs.teacher if uses_heads(loss) else None,
            targets=targets if columns else None,
            map=mapping,
            shared=inputs.shared if uses_heads(loss) else None,
        )
        stored = (targets,) if columns else ()
        before = ordered([*self.first(config, inputs), *stored, prefix, *_one(mapping)])
        return Recipe(pairs=pairs, artifacts=(*before, update))


# Transfers of the same inputs share these: a key is made once, and a plan has thousands of them.


@functools.lru_cache(maxsize=256)
def _scores(inputs: Inputs, settings: Attribution) -> LayerScores:
    return LayerScores(model=inputs.teacher, rows=inputs.attribution_teacher, settings=settings)


@functools.lru_cache(maxsize=256)
def _similarity(inputs: Inputs) -> Similarity:
    return Similarity(
        teacher=inputs.teacher,
        student=inputs.student,
        teacher_rows=inputs.attribution_teacher,
        student_rows=inputs.attribution,
    )


@functools.lru_cache(maxsize=4096)
def _targets(inputs: Inputs, extraction: Extraction, columns: frozenset[Column]) -> Activations:
    return Activations(
        model=inputs.teacher,
        rows=inputs.train_teacher,
        columns=columns,
        positions=extraction.positions,
        dtype=extraction.dtype,
        extraction=extraction,
    )


@functools.lru_cache(maxsize=4096)
def _prefix(inputs: Inputs, extraction: Extraction, dtype: str, layer: int) -> Prefix:
    return Prefix(
        model=inputs.student,
        rows=inputs.train.whole,
        columns=frozenset([Column(layer, "input")]),
        positions="all",
        dtype=dtype,
        extraction=extraction,
    )


@functools.lru_cache(maxsize=256)
def _map(inputs: Inputs, alignment: Alignment) -> Map:
    return Map(
        student=inputs.student,
        teacher=inputs.teacher,
        shared=inputs.shared,
        alignment=alignment,
    )


def _one(mapping: Map | None) -> tuple[Map, ...]:
    return () if mapping is None else (mapping,)


def rankings(layers: int, count: int, most: int = MOST_OUTCOMES) -> Sequence[tuple[int, ...]]:
    """Every order in which `count` of the layers may be the most critical, from 0.

    Where there are more than `most`: only those of neighbouring layers and of layers that are
    spread evenly, which need the most of everything.
    """
    count = min(count, layers)
    if math.perm(layers, count) <= most:
        return list(itertools.permutations(range(layers), count))
    steps = dict.fromkeys((1, layers // count))
    return [
        tuple((first + step * place) % layers for place in range(count))
        for step in steps
        for first in range(layers)
    ]


def similar(layers: int, count: int, most: int = MOST_OUTCOMES) -> Sequence[tuple[int, ...]]:
    """Student layers that may be the most similar to each of `count` teacher layers.

    Where there are more than `most`: only one layer for all, and neighbours.
    """
    if layers**count <= most:
        return list(itertools.product(range(layers), repeat=count))
    return [
        tuple((first + step * place) % layers for place in range(count))
        for step in (0, 1)
        for first in range(layers)
    ]


def _peaks(nearest: Mapping[int, int], teacher: int, student: int) -> list[list[float]]:
    """A similarity by which each teacher layer has that nearest student layer, others the first."""
    return [
        [float(column == nearest.get(row, 0)) for column in range(student)]
        for row in range(teacher)
    ]


def _pairs(
    config: Config,
    inputs: Inputs,
    critical: Sequence[int],
    similarity: Sequence[Sequence[float]] | None,
) -> tuple[Pair, ...]:
    return tuple(
        pair_layers(
            config.pairing.strategy,
            num_teacher_layers=inputs.teacher.layers,
            num_student_layers=inputs.student.layers,
            critical=list(critical),
            seed=config.seed,
            explicit=list(config.pairing.explicit or ()),
            similarity=similarity,
        )
    )


def _unused_by_loss(config: Config, decider: str) -> dict[str, str]:
    """Settings of terms whose weight is 0; `decider` is the setting that makes it so."""
    loss, found = config.loss, {}
    how = ("alignment.map", "alignment.top_k")
    if loss.alpha == 0:
        found = dict.fromkeys(("loss.objective", "extraction.interface", *how), decider)
        if config.extraction.layers:
            del found["extraction.interface"]
        if loss.gamma == 0 and not config.extraction.layers:
            found |= dict.fromkeys(("extraction.positions", "extraction.dtype"), decider)
    elif not OBJECTIVES.find(loss.objective, "loss.objective").uses_map:
        found = dict.fromkeys(how, f"loss.objective={loss.objective}")
    return found


def _unused_by_pairing(config: Config) -> dict[str, str]:
    """Settings that the strategy does not look at."""
    strategy = STRATEGIES.find(config.pairing.strategy, "pairing.strategy")
    decider, found = f"pairing.strategy={config.pairing.strategy}", {}
    if "explicit" not in strategy.looks_at:
        found["pairing.explicit"] = decider
    if "critical" not in strategy.looks_at:
        found |= dict.fromkeys(("attribution.granularity", "attribution.aggregation"), decider)
        if "similarity" not in strategy.looks_at:
            found["data.attribution_split"] = decider
        if "count" not in strategy.looks_at:
            found["attribution.top_n"] = decider
    return found
