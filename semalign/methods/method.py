"""Methods of transfer: which settings one uses, what it makes in which order, what comes out."""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from semalign.artifacts.artifact import Artifact, Json, Workspace, union
from semalign.config.describe import given_settings, leaf_settings, runtime_settings
from semalign.config.dotted import lookup, nested
from semalign.config.jobs import Config
from semalign.core.pairing import Pair
from semalign.errors import UserError
from semalign.files import content_key
from semalign.methods.inputs import Inputs, load_inputs
from semalign.models.peft_folder import LARGEST_RANK
from semalign.plugins import load_plugins
from semalign.registry import Registry
from semalign.stages.judged import evaluated_content
from semalign.tasks import TASKS

MOST_OUTCOMES = 20_000  # that a plan enumerates; of more a selection stands for all


@dataclass(frozen=True)
class Outcome:
    """What may be found before the pairs are known, and the pairs that it leads to.

    `findings`: (question, answer) in their order; which question comes next
    depends on the answers so far. Questions that share an artifact's key are equal across
    transfers, so that what one transfer finds decides the pairs of another one too.
    """

    findings: tuple[tuple[Hashable, Hashable], ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The artifacts of a transfer in the order in which they are made; the last is its result."""

    pairs: tuple[Pair, ...]
    artifacts: tuple[Artifact, ...]

    @property
    def result(self) -> Artifact:
        return self.artifacts[-1]


class Method(ABC):
    """One way to transfer. An instance is registered by its name in METHODS.

    `pairs_layers`: it trains the student layers that `pairing` pairs. `align_split` names the split
    of alignment rows, for methods that read one.
    """

    pairs_layers: ClassVar[bool] = False

    @property
    def description(self) -> str:
        return (type(self).__doc__ or "").partition("\n")[0]

    def run_name(self, config: Config) -> str:
        """How the run of a transfer is called, next to its task."""
        return config.method

    def effective(self, config: Config) -> Config:
        """The configuration with the values that this method gives to what was left open."""
        return config

    @abstractmethod
    def unused(self, config: Config) -> Mapping[str, str]:
        """Settings, or sections, without an effect, each with the setting that decides so."""

    def align_split(self, config: Config) -> str | None:
        return None

    def trained_splits(self, config: Config) -> tuple[str, ...]:
        """The splits whose answers change the student."""
        return (config.data.train_split,)

    def check(self, config: Config, inputs: Inputs) -> None:  # noqa: B027 -- nothing to check
        """Raise UserError for models that this method cannot work on, from shapes alone."""

    def first(self, config: Config, inputs: Inputs) -> tuple[Artifact, ...]:
        """What has to be made before the pairs are known."""
        return ()

    def pairs(self, config: Config, inputs: Inputs, first: Sequence[Path]) -> tuple[Pair, ...]:
        """The pairs to train, from the folders of what was made first."""
        return ()

    def outcomes(self, config: Config, inputs: Inputs) -> Iterator[Outcome]:
        """All that `pairs` might return, whatever is found first; from shapes alone."""
        yield Outcome((), ())

    def pairs_settings(self, config: Config) -> Json:
        """What of an effective configuration decides `outcomes`, besides `first` and the models."""
        return used_settings(config)

    @abstractmethod
    def recipe(self, config: Config, inputs: Inputs, pairs: tuple[Pair, ...]) -> Recipe:
        """Everything that is made, with the given pairs."""

    @abstractmethod
    def rank(self, config: Config) -> int | None:
        """Of the LoRA adapter that comes out; None when it is a whole student."""

    def dtype(self, config: Config) -> str:
        """What the result is run in when it is scored."""
        return config.dtype


METHODS: Registry[Method] = Registry("method")


def register_method(name: str, method: Method) -> None:
    """Add a method of transfer: `method=<name>` in a configuration then runs it."""
    METHODS.register(name, method)


def method_of(config: Config) -> Method:
    """Raises UserError for an unknown name."""
    return METHODS.find(config.method, "method")


def effective(config: Config) -> Config:
    """The configuration with every open value filled in: the method's, or Table 5's of the task.

    These values are logged, saved and hashed. Raises UserError for a setting that was given and has
    no effect, naming the setting that decides so.
    """
    load_plugins(config.plugins)
    found = filled(config)
    check_effective(config, found)
    return found


def check_effective(config: Config, found: Config) -> None:
    """Raise UserError for a setting that `config` gives and that has no effect in its effective
    configuration `found`, for weights that are all 0, and for an adapter that cannot be served.
    """
    _refuse_unused(config, found)
    if found.loss.alpha == found.loss.beta == found.loss.gamma == 0:
        raise UserError("loss: alpha, beta and gamma are all 0: there is nothing to learn")
    rank = method_of(found).rank(found) or 0
    if rank > LARGEST_RANK:
        setting = next(name for name in used_settings(found) if name.endswith(".rank"))
        raise UserError(
            f"{setting}: the adapter would have rank {rank}; expected at most {LARGEST_RANK}, the "
            "largest that vLLM serves"
        )


def filled(config: Config) -> Config:
    """As `effective`, where settings without effect are not refused."""
    found = method_of(config).effective(config)
    training, task = found.training, TASKS.find(found.data.task, "data.task")
    if not task.labelled:
        found = _without_labels(config, found)
    values = {
        "epochs": training.epochs or task.epochs,
        "lr": training.lr or task.lr,
        "lora": training.lora.model_copy(update={"alpha": training.lora.scaling_alpha}),
    }
    return found.model_copy(update={"training": training.model_copy(update=values)})


def _without_labels(config: Config, found: Config) -> Config:
    """The configuration of a corpus: no cross-entropy, whatever the default of its weight.

    Raises UserError for settings of labels, and where nothing is left to learn from.
    """
    corpus = f"data.task={found.data.task}: a corpus has no labels"
    if config.loss.beta > 0 and "beta" in config.loss.model_fields_set:
        raise UserError(f"{corpus}; expected loss.beta=0, found {config.loss.beta:g}")
    for name in ("labelled_limit", "label_noise"):
        if getattr(config.data, name):
            raise UserError(f"data.{name}: {corpus.partition(': ')[2]}; leave it out")
    if found.loss.alpha == found.loss.gamma == 0:
        raise UserError(
            f"{corpus}, and method={found.method} learns from nothing else; expected loss.alpha or "
            "loss.gamma above 0, with a method that has one"
        )
    return found.model_copy(update={"loss": found.loss.model_copy(update={"beta": 0.0})})


def _refuse_unused(config: Config, found: Config) -> None:
    sections = config.model_fields_set
    unused = {n: by for n, by in unused_settings(found).items() if n.partition(".")[0] in sections}
    given = given_settings(config) if unused else {}
    unused = {name: by for name, by in unused.items() if name in given}
    if not unused:
        return
    kept = {name: value for name, value in given.items() if name not in unused}
    # what the settings would be if they had been left out
    neutral = filled(Config.model_validate(nested(kept))).model_dump()
    for name, decider in unused.items():
        value = given[name]
        if value != lookup(neutral, name):
            raise UserError(f"{name}={_shown(value)}: has no effect with {decider}; leave it out")


def _shown(value: Any) -> str:
    return json.dumps(value, default=str) if not isinstance(value, str) else value


def unused_settings(config: Config) -> dict[str, str]:
    """Every setting (dotted) that has no effect, with the setting that decides so.

    `config` is an effective one. Settings of where and how a run goes are not among them.
    """
    found: dict[str, str] = {}
    for prefix, decider in method_of(config).unused(config).items():
        for name in _leaves(prefix):
            found.setdefault(name, decider)
    if config.evaluation.limit is None:
        found["evaluation.limit_seed"] = "evaluation.limit=null"
    return found


def used_settings(config: Config) -> dict[str, Any]:
    """Dotted, every setting that decides what an effective configuration's transfer leaves."""
    unused = unused_settings(config)
    tree = config.model_dump(mode="json")
    found: dict[str, Any] = {}
    for section, names in _sections():
        node = lookup(tree, section) if section else tree
        if node is not None:  # an optional section may not be given
            found |= {name: node[leaf] for name, leaf in names if name not in unused}
    return found


@functools.cache
def _sections() -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Each section with the dotted and the last names of its settings, without runtime ones."""
    found: dict[str, list[tuple[str, str]]] = {}
    runtime = runtime_settings(Config)
    for name in leaf_settings(Config):
        section, _, leaf = name.rpartition(".")
        if name not in runtime:
            found.setdefault(section, []).append((name, leaf))
    return tuple((section, tuple(names)) for section, names in found.items())


# Paths, whose content is hashed where an artifact or a run is named.
_CONTENT_COUNTS = ("teacher", "student", "data.root", "evaluation.root")


@functools.cache
def _leaves(prefix: str) -> tuple[str, ...]:
    names = [name for _, names in _sections() for name, _ in names]
    return tuple(name for name in names if name == prefix or name.startswith(f"{prefix}."))


@dataclass(frozen=True, eq=False)
class Transfer:
    """A transfer that can be run: its effective configuration and its inputs."""

    config: Config
    inputs: Inputs

    @classmethod
    def of(cls, config: Config, *, planned: bool = False) -> Transfer:
        """Fill in and check the configuration, and read its inputs; loads no weights."""
        found = effective(config)
        method = method_of(found)
        inputs = load_inputs(
            found,
            trained=method.trained_splits(found),
            align_split=method.align_split(found),
            planned=planned,
        )
        method.check(found, inputs)
        return cls(found, inputs)

    @property
    def method(self) -> Method:
        return method_of(self.config)

    @functools.cached_property
    def first(self) -> tuple[Artifact, ...]:
        """What has to be made before the pairs are known."""
        return self.method.first(self.config, self.inputs)

    def recipe(self, workspace: Workspace) -> Recipe:
        """Everything that is made, once `first` is there."""
        places = [workspace.place(artifact) for artifact in self.first]
        pairs = self.method.pairs(self.config, self.inputs, places)
        return self.method.recipe(self.config, self.inputs, pairs)

    def known(self, workspace: Workspace) -> bool:
        """Whether the recipe is known without making anything."""
        return not workspace.missing(self.first)

    def check_room(self, workspace: Workspace) -> None:
        """Raise UserError when a disk cannot hold what is missing, whichever pairs are found."""
        refused = None
        for recipe in [self.recipe(workspace)] if self.known(workspace) else self.possible():
            try:
                return workspace.check_room(recipe.artifacts)
            except UserError as error:
                refused = error
        if refused is not None:
            raise refused

    def decided(self, workspace: Workspace) -> tuple[Artifact, ...]:
        """Everything that is known to be needed: before the pairs are, what decides them."""
        return self.recipe(workspace).artifacts if self.known(workspace) else self.first

    def possible(self) -> Iterator[Recipe]:
        """A recipe for all pairs that may be found, each once; from shapes alone."""
        outcomes = self.method.outcomes(self.config, self.inputs)
        for pairs in dict.fromkeys(outcome.pairs for outcome in outcomes):
            yield self.method.recipe(self.config, self.inputs, pairs)

    @functools.cached_property
    def key(self) -> str:
        """Names the run: models, rows and all settings that decide what it leaves."""
        used = used_settings(self.config)
        named = {name: value for name, value in used.items() if name not in _CONTENT_COUNTS}
        return content_key("transfer", named, self._content(used))

    def _content(self, used: Mapping[str, Any]) -> list[Any]:
        """The content of what the used settings only name."""
        inputs = self.inputs
        models = [[m.weights, m.tokens, m.serving] for m in (inputs.teacher, inputs.student)]
        attribution = inputs.attribution.key if "data.attribution_split" in used else None
        rows = [inputs.train.key, attribution, inputs.align.key]
        return [models, rows, evaluated_content(self.config)]


def bytes_to_write(transfers: Iterable[Transfer], workspace: Workspace) -> int:
    """What all of them still add to the disk, as far as is known before their pairs are."""
    needed = union(artifact for each in transfers for artifact in each.decided(workspace))
    return sum(workspace.bytes_to_write(needed).values())
