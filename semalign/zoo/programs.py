"""Small functions in the schemas of HumanEval and MBPP: chains of one to four sampled steps.

HumanEval rows want one nested expression, MBPP rows one assignment per step. Both are made from
the same chains and share the key that decides the split, so that a chain seen in the training
data of one is never in the test data of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from semalign.tasks.task import Row


@dataclass(frozen=True)
class Link:
    """An operation: in `code`, {e} is the expression it is applied to, {c} a sampled constant."""

    takes: str
    gives: str
    phrase: str
    gerund: str
    code: str
    constants: tuple[str, ...] = ("",)

    @property
    def binary(self) -> bool:
        """Whether the result needs parentheses inside a larger expression."""
        return self.code.startswith("{e} ") or self.code.endswith(" {e}")


DIGITS = tuple("23456789")
COUNTED = tuple("aeot")
ENDINGS = tuple(f"'{c}'" for c in "xyz")

LINKS = (
    Link("x", "x", "add {c}", "adding {c}", "{e} + {c}", DIGITS),
    Link("x", "x", "subtract {c}", "subtracting {c}", "{e} - {c}", DIGITS),
    Link("x", "x", "multiply by {c}", "multiplying by {c}", "{e} * {c}", DIGITS),
    Link("x", "x", "subtract from {c}", "subtracting from {c}", "{c} - {e}", DIGITS),
    Link("x", "x", "divide by {c} rounding down", "dividing by {c} rounding down",
         "{e} // {c}", DIGITS),
    Link("x", "x", "take the remainder by {c}", "taking the remainder by {c}", "{e} % {c}", DIGITS),
    Link("x", "x", "square", "squaring", "{e} ** 2"),
    Link("x", "x", "take the absolute value", "taking the absolute value", "abs({e})"),
    Link("x", "x", "raise to at least {c}", "raising to at least {c}", "max({e}, {c})", DIGITS),
    Link("x", "x", "cap at {c}", "capping at {c}", "min({e}, {c})", DIGITS),
    Link("xs", "xs", "keep the numbers above {c}", "keeping the numbers above {c}",
         "[n for n in {e} if n > {c}]", DIGITS),
    Link("xs", "xs", "keep the numbers below {c}", "keeping the numbers below {c}",
         "[n for n in {e} if n < {c}]", DIGITS),
    Link("xs", "xs", "keep the even numbers", "keeping the even numbers",
         "[n for n in {e} if n % 2 == 0]"),
    Link("xs", "xs", "keep the odd numbers", "keeping the odd numbers",
         "[n for n in {e} if n % 2 == 1]"),
    Link("xs", "xs", "add {c} to each", "adding {c} to each", "[n + {c} for n in {e}]", DIGITS),
    Link("xs", "xs", "multiply each by {c}", "multiplying each by {c}",
         "[n * {c} for n in {e}]", DIGITS),
    Link("xs", "xs", "sort", "sorting", "sorted({e})"),
    Link("xs", "xs", "reverse", "reversing", "{e}[::-1]"),
    Link("xs", "xs", "drop the first {c}", "dropping the first {c}", "{e}[{c}:]", ("2", "3")),
    Link("xs", "xs", "take the first {c}", "taking the first {c}", "{e}[:{c}]", ("2", "3")),
    Link("xs", "x", "take the sum", "taking the sum", "sum({e})"),
    Link("xs", "x", "take the largest", "taking the largest", "max({e})"),
    Link("xs", "x", "take the smallest", "taking the smallest", "min({e})"),
    Link("xs", "x", "count them", "counting them", "len({e})"),
    Link("s", "s", "reverse", "reversing", "{e}[::-1]"),
    Link("s", "s", "turn to upper case", "turning to upper case", "{e}.upper()"),
    Link("s", "s", "repeat {c} times", "repeating {c} times", "{e} * {c}", ("2", "3")),
    Link("s", "s", "append {c}", "appending {c}", "{e} + {c}", ENDINGS),
    Link("s", "s", "put {c} in front", "putting {c} in front", "{c} + {e}", ENDINGS),
    Link("s", "s", "take the first {c}", "taking the first {c}", "{e}[:{c}]", DIGITS[:4]),
    Link("s", "s", "drop the first {c}", "dropping the first {c}", "{e}[{c}:]", ("2", "3")),
    Link("s", "s", "remove each {c}", "removing each {c}", "{e}.replace('{c}', '')", COUNTED),
    Link("s", "x", "count the letters", "counting the letters", "len({e})"),
    Link("s", "x", "count each {c}", "counting each {c}", "{e}.count('{c}')", COUNTED),
)  # fmt: skip
WORDS = ("tomato", "potato", "rotate", "teapot", "estate", "toast", "meteor", "sonata", "oatmeal")
VERBS = ("apply", "build", "change", "compute", "convert", "get", "make", "run", "solve", "work")
NOUNS = ("answer", "item", "output", "result", "total", "value")
HIDDEN = 0.3
"""Share of the MBPP rows of which one number is to be found from the tests."""
LONGEST_RESULT = 20
"""Characters of a test's expected value; keeps the prompts short."""


@dataclass(frozen=True)
class Chain:
    """Steps with their constants, from the argument to the returned value."""

    argument: str
    steps: tuple[tuple[Link, str], ...]

    def expression(self) -> str:
        """The nested form."""
        code, binary = self.argument, False
        for step, constant in self.steps:
            inner = f"({code})" if binary and self._needs_parentheses(step) else code
            code, binary = step.code.format(e=inner, c=constant), step.binary
        return code

    @staticmethod
    def _needs_parentheses(step: Link) -> bool:
        return step.binary or step.code.startswith("{e}")

    def statements(self, indent: str = "    ") -> str:
        """One assignment per step; the last step is returned."""
        lines, name = [], self.argument
        for index, (step, constant) in enumerate(self.steps):
            code = step.code.format(e=name, c=constant)
            last = index == len(self.steps) - 1
            name = step.gives
            lines.append(f"{indent}return {code}" if last else f"{indent}{name} = {code}")
        return "\n".join(lines)

    def describe(self, rng: Random, hide: bool = False) -> str:
        """The chain in words: in the order of execution, or from the last step backwards.

        With `hide`, one number is left out; it follows from the tests.
        """
        described = list(self.steps)
        numbers = [i for i, (step, _) in enumerate(described) if step.constants == DIGITS]
        if hide and numbers:
            index = rng.choice(numbers)
            described[index] = (described[index][0], "some number")
        phrases = [step.phrase.format(c=constant) for step, constant in described]
        if len(phrases) == 1:
            return phrases[0]
        if rng.random() < 0.5:
            return f"{', '.join(phrases[:-1])}, then {phrases[-1]}"
        gerunds = [step.gerund.format(c=constant) for step, constant in described[:-1]]
        return f"{phrases[-1]}, after {', after '.join(reversed(gerunds))}"


def sample_chain(rng: Random) -> Chain:
    """A chain of one to four operations, none twice."""
    kind = argument = rng.choice(("x", "xs", "s"))
    steps: list[tuple[Link, str]] = []
    for _ in range(rng.choice((1, 2, 2, 3, 3, 4))):
        used = [step for step, _ in steps]
        step = rng.choice([s for s in LINKS if s.takes == kind and s not in used])
        steps.append((step, rng.choice(step.constants)))
        kind = step.gives
    return Chain(argument, tuple(steps))


def sample_input(rng: Random, argument: str) -> Any:
    """A value for a number `x`, a word `s` or a list of digits `xs`."""
    if argument == "x":
        return rng.randint(-9, 20)
    if argument == "s":
        return rng.choice(WORDS)
    return [rng.randint(0, 9) for _ in range(rng.randint(4, 5))]


def sample_tests(rng: Random, chain: Chain, count: int) -> list[tuple[str, str]] | None:
    """Inputs with expected values, as Python text.

    None if the chain fails, gives too few different values, or only returns its input.
    """
    code = compile(chain.expression(), "chain", "eval")
    tests: dict[str, str] = {}
    for _ in range(4 * count):
        value = sample_input(rng, chain.argument)
        try:
            result = repr(eval(code, {chain.argument: value}))  # our own expression
        except ValueError:  # the maximum of an empty list
            return None
        if len(result) <= LONGEST_RESULT and result not in tests.values():
            tests[repr(value)] = result
        if len(tests) == count:
            break
    changes = any(value != result for value, result in tests.items())
    return list(tests.items()) if len(tests) == count and changes else None


def _sample(rng: Random, tests: int) -> tuple[str, Chain, list[tuple[str, str]], str]:
    while True:
        chain = sample_chain(rng)
        pairs = sample_tests(rng, chain, tests)
        if pairs:
            break
    name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    return chain.expression(), chain, pairs, name


def function_body(rng: Random) -> tuple[str, Row]:
    """One HumanEval row: a signature and docstring to complete."""
    key, chain, pairs, name = _sample(rng, tests=3)
    text = chain.describe(rng)
    checks = "".join(f"    assert candidate({value}) == {result}\n" for value, result in pairs)
    row = {
        "task_id": "",
        "prompt": f'def {name}({chain.argument}):\n    """{text[0].upper()}{text[1:]}."""\n',
        "entry_point": name,
        "canonical_solution": f"    return {chain.expression()}\n",
        "test": f"def check(candidate):\n{checks}",
    }
    return key, row


def whole_function(rng: Random) -> tuple[str, Row]:
    """One MBPP row: a function to write from a sentence and its tests."""
    key, chain, pairs, name = _sample(rng, tests=2)
    row = {
        "task_id": "",
        "text": f"Write a function to {chain.describe(rng, hide=rng.random() < HIDDEN)}.",
        "code": f"def {name}({chain.argument}):\n{chain.statements()}",
        "test_list": [f"assert {name}({value}) == {result}" for value, result in pairs],
        "test_setup_code": "",
    }
    return key, row
