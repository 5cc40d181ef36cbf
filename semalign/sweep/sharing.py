"""Which artifacts the trials of a sweep share: what all their recipes make, by key.

Trials that differ in nothing that decides their pairs and what is made before the result are a
group: all pairs that they may be given are enumerated once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from semalign.artifacts.artifact import Artifact, Cost
from semalign.core.pairing import Pair
from semalign.files import content_key
from semalign.methods.method import Recipe, Transfer
from semalign.plan import Step, dearest_cost, recipe_steps
from semalign.sweep.outcomes import Choice, Count, Tally, choice_of, most

Pairs = tuple[Pair, ...]


@dataclass(eq=False)
class Group:
    """Trials by id, the choice of their pairs and, for each leaf of it, the artifacts that are made
    before the result, and the part of the result's identity that the pairs decide.

    `before`: the stages before the result, at most. `dearest`: pairs whose result costs most, in
    one figure or another. `artifacts` and `costs`: a result of each trial, and what it costs at
    most.
    """

    choice: Choice
    made: list[tuple[Artifact, ...]]
    results: list[str]
    dearest: list[Pairs]
    before: tuple[Step, ...]
    trials: dict[str, Transfer] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)

    def parts(self, stage: str) -> int:
        """How many parts of a stage's artifacts a trial needs at most; 1 of one without parts."""
        return max(
            sum(max(1, len(a.parts)) for a in made if a.stage == stage)
            for made in dict.fromkeys(self.made)
        )


@dataclass(eq=False)
class Need:
    """An artifact that is needed, with all parts that may be; the groups that need it, a thing of
    the tally for each part.
    """

    artifact: Artifact
    groups: list[Group] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    count: Count = field(default=Count(0, 0))


@dataclass(eq=False)
class SharedResult:
    """What comes out of some trials that differ in their pairs alone.

    `cost`: at most, of one of them; `groups`: in which it is made.
    """

    transfer: Transfer
    artifact: Artifact
    cost: Cost = field(default_factory=Cost)
    groups: dict[Group, None] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether a whole student comes out, not an adapter."""
        return self.transfer.method.rank(self.transfer.config) is None


class Sharing:
    """The transfers of a sweep by trial id, in groups, with their needs and results.

    `trainings`: how many results there are at most. `alike`: results that the same groups make,
    with the number of times that each is made with other pairs.
    """

    def __init__(self, transfers: Mapping[str, Transfer]) -> None:
        self.groups: dict[Hashable, Group] = {}
        self.results: dict[Hashable, SharedResult] = {}
        self._choices: dict[str, Choice] = {}
        for name, transfer in transfers.items():
            self._add(name, transfer)
        self.needs = _needs(list(self.groups.values()))
        _, counts = most([need.tally for need in self.needs])
        for need, count in zip(self.needs, counts, strict=True):
            need.count = count
        alike = _alike(self.results.values())
        self.trainings, made = most([tally for _, tally in alike])
        self.alike = [(r, count) for (r, _), count in zip(alike, made, strict=True)]

    def _add(self, name: str, transfer: Transfer) -> None:
        choice = self._choice(transfer)
        first, last = (_recipe(transfer, pairs) for pairs in _probes(choice, transfer))
        identity, other = _identity(first), _identity(last)
        varying = tuple(part for part, value in identity.items() if other[part] != value)
        before = tuple((a.key, a.parts) for r in (first, last) for a in r.artifacts[:-1])
        key = choice, varying, before
        if key not in self.groups:
            self.groups[key] = _group(choice, transfer, varying)
        group = self.groups[key]
        cost = dearest_cost(_recipe(transfer, pairs).result.cost() for pairs in group.dearest)
        group.trials[name] = transfer
        group.artifacts.append(first.result)
        group.costs.append(cost)
        fixed = {part: value for part, value in identity.items() if part not in varying}
        content = content_key(first.result.kind, first.result.schema, fixed, varying)
        result = self.results.setdefault(content, SharedResult(transfer, first.result))
        result.cost = dearest_cost([result.cost, cost])
        result.groups[group] = None

    def _choice(self, transfer: Transfer) -> Choice:
        method, config, inputs = transfer.method, transfer.config, transfer.inputs
        key = content_key(
            *(config.method, method.pairs_settings(config)),
            [artifact.key for artifact in transfer.first],
            [inputs.teacher.layers, inputs.student.layers],
        )
        if key not in self._choices:
            self._choices[key] = choice_of(method.outcomes(config, inputs))
        return self._choices[key]

    @property
    def decided(self) -> bool:
        """Whether all pairs are known."""
        return all(len(group.choice.leaves) == 1 for group in self.groups.values())

    @property
    def exact(self) -> bool:
        """Whether as much is made whatever is found."""
        counts = [*(need.count for need in self.needs), *(count for _, count in self.alike)]
        return all(count.exact for count in counts)

    def number(self, stage: str) -> int:
        """How many artifacts of a stage are made, each with its parts, at most."""
        return most([need.tally for need in self.needs if need.artifact.stage == stage])[0]


def _alike(results: Iterable[SharedResult]) -> list[tuple[list[SharedResult], Tally]]:
    """Results that the same groups make, and a tally with a thing for all that the pairs decide."""
    found: dict[tuple[int, ...], list[SharedResult]] = {}
    for result in results:
        found.setdefault(tuple(sorted(map(id, result.groups))), []).append(result)
    return [(alike, _tally(alike)) for alike in found.values()]


def _tally(results: Sequence[SharedResult]) -> Tally:
    tally = Tally(weight=len(results))
    for group in results[0].groups:
        tally.add(group.choice, [[content] for content in group.results])
    return tally


def _group(choice: Choice, transfer: Transfer, varying: Sequence[str]) -> Group:
    recipes = [_recipe(transfer, pairs) for pairs in choice.leaves]
    costs = [recipe.result.cost() for recipe in recipes]
    figures: list[list[float]] = [
        [cost.operations for cost in costs],
        [cost.disk for cost in costs],
        [cost.memory for cost in costs],
        [recipe.result.trained_parameters for recipe in recipes],
    ]
    dearest = {values.index(max(values)): None for values in figures}
    distinct = {tuple((a.key, a.parts) for a in r.artifacts[:-1]): r for r in recipes}
    steps = [
        step
        for step in recipe_steps(transfer.config, list(distinct.values()))
        if step.stage != recipes[0].result.stage
    ]
    return Group(
        choice=choice,
        made=[recipe.artifacts[:-1] for recipe in recipes],
        results=[
            content_key({part: _identity(recipe)[part] for part in varying}) for recipe in recipes
        ],
        dearest=[choice.leaves[leaf] for leaf in dearest],
        before=tuple(steps),
    )


def _recipe(transfer: Transfer, pairs: Pairs) -> Recipe:
    return transfer.method.recipe(transfer.config, transfer.inputs, pairs)


def _identity(recipe: Recipe) -> dict[str, object]:
    """The parts of a result's identity by name, what it needs among them."""
    result = recipe.result
    found = result.identity()
    return {**found, "needs": [need.key for need in result.needs()]}


def _probes(choice: Choice, transfer: Transfer) -> tuple[Pairs, Pairs]:
    """Pairs that differ in everything: what the pairs decide differs between their recipes.

    They are the same for all transfers of models with so many layers.
    """
    if not any(choice.leaves):
        return (), ()
    teacher, student = transfer.inputs.teacher.layers, transfer.inputs.student.layers
    lowest, highest = Pair((0,), (1.0,), 0), Pair((teacher - 1, 0), (0.75, 0.25), student - 1)
    return (lowest,), (highest,)


def _needs(groups: Sequence[Group]) -> list[Need]:
    found: dict[str, Need] = {}
    for group in groups:
        own: dict[str, list[frozenset[Hashable]]] = {}
        for leaf, made in enumerate(group.made):
            for artifact in made:
                need = found.setdefault(artifact.key, Need(artifact))
                if not artifact.parts <= need.artifact.parts:
                    need.artifact = need.artifact.joined(artifact)
                things = own.setdefault(artifact.key, [frozenset()] * len(group.made))
                things[leaf] = artifact.parts or frozenset([None])
        for key, things in own.items():
            found[key].groups.append(group)
            found[key].tally.add(group.choice, things)
    return list(found.values())
