"""What each trial of a sweep needs, by keys that are equal where trials can share it.

Layers count from 0. Which layers a strategy pairs may be up to an attribution that has not run yet;
such a layer is a name, equal where the layers are sure to be.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from semalign.config.jobs import Config
from semalign.core.pairing import Pair, code_index
from semalign.data.root import data_root
from semalign.data.tokens import Tokens, fingerprint
from semalign.files import content_key
from semalign.models.fingerprints import model_fingerprint
from semalign.stages.costs import Shape, shape_of
from semalign.stages.inputs import Inputs, check_layers, load_inputs
from semalign.stages.plan import known_pairs
from semalign.stages.scoring import chosen_protocol
from semalign.stages.supervision import teacher_columns
from semalign.sweep.trials import Trial
from semalign.tasks import load_split

# Strategies that take what the critical teacher layer itself says, and those that train student
# layer k-dagger of the critical layer (core/pairing.py).
_CRITICAL = ("attributed", "cka", "reverse")
_K_DAGGER = ("attributed", "interpolated", "proportional")
_HARDWARE = {"num_workers", "cpus_per_worker", "use_gpu", "max_failures"}

Column = tuple[Hashable, str]  # teacher layer, interface


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """One trial: its inputs, and a key of every file that it makes or reads, None for those that it
    does without.

    `pairs` is None while attribution decides them. `columns` are in the teacher's store; `first` is
    the first trained student layer, whose inputs are in the prefix store.
    """

    trial: Trial
    inputs: Inputs
    teacher: Shape
    student: Shape
    pairs: tuple[Pair, ...] | None
    columns: frozenset[Column]
    first: Hashable
    attribution: str | None
    similarity: str | None
    store: str | None
    prefix: str | None
    map: str | None
    factors: str | None = None

    @property
    def config(self) -> Config:
        return self.trial.config

    @property
    def whole(self) -> bool:
        """Whether the result is a whole student, not a LoRA adapter of it."""
        return self.config.adapter_rank is None

    @property
    def layers(self) -> int:
        """How many of the student's layers are trained, at most."""
        if not self.config.pairs_layers:
            return self.student.layers
        pairs = {pair.student for pair in self.pairs or ()}
        return len(pairs) or self.config.attribution.top_n

    @property
    def training(self) -> str:
        """Equal trainings leave equal adapters; the hardware has no say."""
        config = self.config
        if not config.pairs_layers:
            return content_key(
                config.model_dump(exclude={"evaluation", "workdir", "tracking", "cluster"})
            )
        decided = (self.attribution, config.pairing.strategy, config.attribution.top_n)
        return content_key(
            *(config.epochs, config.lr, config.seed, config.extraction.positions),
            *(config.training.model_dump(exclude=_HARDWARE), config.loss.model_dump()),
            config.data.labelled_limit,
            *(self.store, self.prefix, self.map, config.interfaces, self.pairs or decided),
        )


def share_inputs(trials: Sequence[Trial], *, planned: bool = False) -> dict[str, Inputs]:
    """Each trial's inputs by its id, read once where trials have the same. No weight is loaded.

    `planned`, and raises UserError, as `load_inputs`.
    """
    loaded: dict[str, Inputs] = {}
    found = {}
    for trial in trials:
        config, key = trial.config, _inputs_key(trial.config)
        if key not in loaded:
            loaded[key] = load_inputs(config, planned=planned)
        inputs = loaded[key]
        check_layers(config, inputs.teacher.num_hidden_layers, inputs.student.num_hidden_layers)
        extra = tuple(code_index(number) for number in config.extraction.layers)
        found[trial.id] = replace(inputs, extra_layers=extra)
    return found


def _inputs_key(config: Config) -> str:
    """Of all settings that `load_inputs` looks at, but the layers."""
    return content_key(
        *(config.teacher, config.student, config.trust_remote_code, config.alignment.min_overlap),
        *(config.data.model_dump(), config.evaluation.model_dump()),
        config.laten.align_split if config.method == "laten" else None,
    )


def contents(trials: Sequence[Trial], inputs: Mapping[str, Inputs]) -> list[str]:
    """Fingerprints of what the settings of trials only name: models, rows, questions, protocols.

    Reads every weight once per process: about a minute for 26 GB.
    """
    configs, prints = [trial.config for trial in trials], _once(fingerprint)
    models = {model_fingerprint(m) for c in configs for m in (c.teacher, c.student)}
    owns = [inputs[trial.id] for trial in trials]
    rows = {prints(tokens) for own in owns for tokens in (own.train, own.attribution, own.align)}
    asked = {
        (config.evaluation.root or config.data.root, task, split)
        for config in configs
        for task in config.evaluation.tasks
        for split in config.evaluation.splits
    }
    questions = {content_key(load_split(data_root(root), *named)) for root, *named in asked}
    protocols = {chosen_protocol(config.evaluation).hash for config in configs}
    return [text for found in (models, rows, questions, protocols) for text in sorted(found)]


def plan_trials(trials: Sequence[Trial], inputs: Mapping[str, Inputs]) -> list[TrialPlan]:
    """What each trial needs, given the inputs that they share."""
    prints: Callable[[list[Tokens]], str] = _once(fingerprint)
    shapes: Callable[[Any], Shape] = _once(shape_of)
    return [_plan(trial, inputs[trial.id], prints, shapes) for trial in trials]


def _once(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function, called once for each object: a dataset or a model's configuration."""
    found: dict[int, Any] = {}

    def remembered(value: Any) -> Any:
        if id(value) not in found:
            found[id(value)] = function(value)
        return found[id(value)]

    return remembered


def _plan(
    trial: Trial,
    inputs: Inputs,
    prints: Callable[[list[Tokens]], str],
    shapes: Callable[[Any], Shape],
) -> TrialPlan:
    config, extraction = trial.config, trial.config.extraction
    if not config.pairs_layers:
        return _whole(trial, inputs, prints, shapes)
    pairs = known_pairs(config, inputs)
    how = config.attribution.granularity, config.attribution.aggregation
    attributed = config.teacher, prints(inputs.attribution_teacher), config.dtype
    attribution = content_key(attributed, how)
    known = teacher_columns(
        pairs or (),
        config.loss,
        config.interfaces,
        num_layers=inputs.teacher.num_hidden_layers,
        extra_layers=inputs.extra_layers,
    )
    named = _named_layers(config, attribution) if pairs is None and config.loss.alpha > 0 else ()
    models = config.teacher, config.student
    return TrialPlan(
        trial=trial,
        inputs=inputs,
        teacher=shapes(inputs.teacher),
        student=shapes(inputs.student),
        pairs=pairs,
        columns=frozenset((column.layer, column.interface) for column in known)
        | {(layer, name) for layer in named for name in config.interfaces},
        first=min(p.student for p in pairs) if pairs else _named_student(config, attribution),
        attribution=attribution,
        similarity=content_key(models, attributed) if config.pairing.strategy == "cka" else None,
        store=content_key(
            *(config.teacher, prints(inputs.train_teacher), config.dtype),
            *(extraction.positions, extraction.dtype, extraction.shard_examples, extraction.store),
        )
        if known or named
        else None,
        prefix=content_key(
            config.student, prints(inputs.train), config.dtype, extraction.shard_examples
        ),
        map=content_key(models, config.alignment.map, config.alignment.top_k)
        if config.loss.uses_map
        else None,
    )


def _whole(
    trial: Trial,
    inputs: Inputs,
    prints: Callable[[list[Tokens]], str],
    shapes: Callable[[Any], Shape],
) -> TrialPlan:
    """Of a method that pairs no layers: nothing is stored before the training."""
    config = trial.config
    seeds = config.teacher, config.student, prints(inputs.attribution_teacher), config.dtype
    return TrialPlan(
        trial=trial,
        inputs=inputs,
        teacher=shapes(inputs.teacher),
        student=shapes(inputs.student),
        pairs=(),
        columns=frozenset(),
        first=0,
        attribution=None,
        similarity=None,
        store=None,
        prefix=None,
        map=None,
        factors=content_key(seeds, config.seeking.factor_settings)
        if config.method == "seeking"
        else None,
    )


def _named_layers(config: Config, attribution: str) -> set[Hashable]:
    """The teacher layers of pairs that attribution decides, at most two a critical layer."""
    strategy, numbers = config.pairing.strategy, range(config.attribution.top_n)
    if strategy in _CRITICAL:
        return {(attribution, "critical", number) for number in numbers}
    if strategy == "proportional":
        return {(attribution, strategy, number) for number in numbers}
    return {(attribution, strategy, number, side) for number in numbers for side in (0, 1)}


def _named_student(config: Config, attribution: str) -> Hashable:
    strategy = config.pairing.strategy
    rule = "k-dagger" if strategy in _K_DAGGER else strategy
    return attribution, rule, config.attribution.top_n
