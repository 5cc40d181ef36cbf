"""The most that a sweep may need, over everything that attribution and similarity may find.

A choice is a tree of questions, such as which teacher layer is the most critical; its leaves are
the pairs that the answers lead to. Choices with a question in common are given the same answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import TypeVar

from semalign.core.pairing import Pair
from semalign.methods.method import MOST_OUTCOMES, Outcome

T = TypeVar("T")


@dataclass(eq=False)
class Question:
    """What is to be found, and what follows each answer: another question, or a leaf's number."""

    subject: Hashable
    answers: dict[Hashable, Question | int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Choice:
    """All pairs that may come out, each once, and the questions that decide among them."""

    leaves: tuple[tuple[Pair, ...], ...]
    root: Question | int
    questions: frozenset[Hashable]
    outcomes: int


def choice_of(outcomes: Iterable[Outcome]) -> Choice:
    """The outcomes as a tree."""
    leaves: dict[tuple[Pair, ...], int] = {}
    questions: set[Hashable] = set()
    top = Question(None)
    count = 0
    for outcome in outcomes:
        node, answer = top, None
        for subject, given in outcome.findings:
            following = node.answers.setdefault(answer, Question(subject))
            assert isinstance(following, Question) and following.subject == subject
            node, answer = following, given
            questions.add(subject)
        node.answers[answer] = leaves.setdefault(outcome.pairs, len(leaves))
        count += 1
    return Choice(tuple(leaves), top.answers[None], frozenset(questions), count)


@dataclass(eq=False)
class Tally:
    """How many things are made, each standing for `weight` of them: a bit a thing.

    `masks` has those that a choice needs, for each of its leaves; what several choices need is made
    once.
    """

    weight: int = 1
    masks: dict[Choice, tuple[int, ...]] = field(default_factory=dict)
    bits: dict[Hashable, int] = field(default_factory=dict)

    def add(self, choice: Choice, things: Sequence[Iterable[Hashable]]) -> None:
        """What the choice needs, for each of its leaves."""
        masks = [
            sum(1 << self.bits.setdefault(t, len(self.bits)) for t in set(own)) for own in things
        ]
        held = self.masks.get(choice, (0,) * len(masks))
        self.masks[choice] = tuple(map(or_, held, masks))

    @property
    def all(self) -> int:
        """How many things there may be at all."""
        return len(self.bits)

    def undecided(self) -> list[Choice]:
        """Choices whose leaves differ in what they need."""
        return [choice for choice, masks in self.masks.items() if len(set(masks)) > 1]

    @property
    def decided(self) -> int:
        """What is needed whatever is found."""
        return reduce(or_, (m[0] for m in self.masks.values() if len(set(m)) == 1), 0)


@dataclass(frozen=True)
class Count:
    """The most things that a tally may need, and the least."""

    most: int
    least: int

    @property
    def exact(self) -> bool:
        return self.most == self.least


def most(tallies: Sequence[Tally]) -> tuple[int, list[Count]]:
    """The most that may be needed of all tallies together, by weight, and the count of each.

    Tallies whose choices depend on each other are enumerated together where they have at most
    `MOST_OUTCOMES` outcomes; otherwise each by itself; then choices that depend on each other by
    themselves, whose sum is no more than there is.
    """
    total, counts = 0, dict[int, Count]()
    for group in _connected(tallies, lambda tally: _questions(tally.undecided())):
        worlds = _worlds([choice for tally in group for choice in tally.undecided()])
        if worlds is not None:
            largest, found = _over(worlds, group)
            total += largest
        else:
            found = [_bound(tally) for tally in group]
            total += sum(t.weight * c.most for t, c in zip(group, found, strict=True))
        counts |= {id(tally): count for tally, count in zip(group, found, strict=True)}
    return total, [counts[id(tally)] for tally in tallies]


Worlds = tuple[list[Choice], list[tuple[int, ...]]]  # choices; a leaf of each, in every world


def _over(worlds: Worlds, tallies: Sequence[Tally]) -> tuple[int, list[Count]]:
    choices, found = worlds
    place = {choice: index for index, choice in enumerate(choices)}
    members = [
        (t.weight, t.decided, [(place[choice], t.masks[choice]) for choice in t.undecided()])
        for t in tallies
    ]
    high, low, largest = [0] * len(tallies), [0] * len(tallies), 0
    for number, leaves in enumerate(found):
        total = 0
        for index, (weight, mask, varying) in enumerate(members):
            for at, masks in varying:
                mask |= masks[leaves[at]]
            count = mask.bit_count()
            total += weight * count
            high[index] = max(high[index], count)
            low[index] = min(low[index], count) if number else count
        largest = max(largest, total)
    return largest, [Count(*ends) for ends in zip(high, low, strict=True)]


def _bound(tally: Tally) -> Count:
    """An upper bound for one tally, and what it needs in any case."""
    choices, least = tally.undecided(), tally.decided.bit_count()
    worlds = _worlds(choices)
    if worlds is not None:
        return _over(worlds, [tally])[1][0]
    count = least
    for group in _connected(choices, lambda choice: choice.questions):
        worlds = _worlds(group)
        alone = Tally(masks={choice: tally.masks[choice] for choice in group})
        if worlds is not None:
            count += _over(worlds, [alone])[0]
        else:
            count += sum(max(m.bit_count() for m in masks) for masks in alone.masks.values())
    return Count(min(count, tally.all), least)


def _worlds(choices: Iterable[Choice]) -> Worlds | None:
    """Every way in which the choices can turn out; None for more than `MOST_OUTCOMES`."""
    ordered = sorted(dict.fromkeys(choices), key=lambda choice: choice.outcomes, reverse=True)
    independent = _connected(ordered, lambda choice: choice.questions)
    if math.prod(max(c.outcomes for c in group) for group in independent) > MOST_OUTCOMES:
        return None
    roots = [choice.root for choice in ordered]
    found = list(itertools.islice(_answered(roots, {}, ()), MOST_OUTCOMES + 1))
    return (ordered, found) if len(found) <= MOST_OUTCOMES else None


def _answered(
    roots: Sequence[Question | int],
    known: dict[Hashable, Hashable],
    leaves: tuple[int, ...],
    node: Question | int | None = None,
) -> Iterator[tuple[int, ...]]:
    """Leaves of all roots, for all answers to what is not `known` yet."""
    while len(leaves) < len(roots):
        node = roots[len(leaves)] if node is None else node
        while isinstance(node, Question):
            if node.subject not in known:
                for answer, following in node.answers.items():
                    known[node.subject] = answer
                    yield from _answered(roots, known, leaves, following)
                del known[node.subject]
                return
            if known[node.subject] not in node.answers:  # it stands for others in another choice
                return
            node = node.answers[known[node.subject]]
        leaves, node = (*leaves, node), None
    yield leaves


def _questions(choices: Iterable[Choice]) -> frozenset[Hashable]:
    return frozenset[Hashable]().union(*(choice.questions for choice in choices))


def _connected(things: Sequence[T], questions: Callable[[T], Iterable[Hashable]]) -> list[list[T]]:
    """Groups of things that have questions in common, directly or by others."""
    groups: list[tuple[frozenset[Hashable], list[T]]] = []
    for thing in things:
        subject, members = frozenset(questions(thing)), [thing]
        joined = [group for group in groups if group[0] & subject]
        groups = [group for group in groups if not group[0] & subject]
        for known, others in joined:
            subject, members = subject | known, [*others, *members]
        groups.append((subject, members))
    return [members for _, members in groups]
