"""The generated rows are true: answers are checked by other means than the ones that made them."""

from __future__ import annotations

import re
from datetime import datetime
from itertools import islice
from math import prod
from random import Random

import pytest

from semalign.zoo import programs, questions, splits


def drafts(subject: str, count: int = 300) -> list[tuple[str, str]]:
    """Questions of a subject with the words of their right choices."""
    rng = Random(7)
    draft, choices = questions.SUBJECTS[subject]
    return [(text, choices[index]) for text, index in (draft(rng) for _ in range(count))]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize("subject", questions.SUBJECTS)
def test_every_choice_is_sometimes_right(subject: str) -> None:
    assert {right for _, right in drafts(subject)} == set(questions.SUBJECTS[subject][1])


def test_arithmetic_names_the_range_of_the_sum() -> None:
    ranges = {"below 50": (0, 49), "50 to 99": (50, 99), "100 to 149": (100, 149)}
    for text, right in drafts("arithmetic"):
        low, high = ranges.get(right, (150, 199))
        assert low <= sum(numbers(text)) <= high


def test_calendar_agrees_with_dates() -> None:
    for text, right in drafts("calendar"):
        shift, word, name = re.search(r"(\d) months (\w+) (\w+)", text).groups()  # type: ignore[union-attr]
        month = datetime.strptime(name, "%B").month + int(shift) * (1 if word == "after" else -1)
        quarter = ((month - 1) % 12) // 3
        assert ["first", "second", "third", "fourth"][quarter] == right


def test_comparison_and_counting_count_correctly() -> None:
    for text, right in drafts("comparison"):
        *values, limit = numbers(text)
        assert int(right) == len([n for n in values if n > limit])
    for text, right in drafts("counting"):
        even = sum(str(n)[-1] in "02468" for n in numbers(text))
        assert int(right) == (even if "even" in text else 3 - even)


def test_logic_follows_from_its_facts() -> None:
    for text, right in drafts("logic"):
        pairs = re.findall(r"(\w+) is taller than (\w+)", text)
        above, below = {a for a, _ in pairs}, {b for _, b in pairs}
        assert {right} == (above - below if "tallest" in text else below - above)


def test_geography_categories_and_properties_name_the_group_of_the_word_in_question() -> None:
    for text, right in drafts("geography"):
        start, end = re.search(r"from (\w+) to (\w+)", text).groups()  # type: ignore[union-attr]
        assert (start if "start" in text else end) in questions.LANDS[right]
    for text, right in drafts("categories"):
        has, wants = re.search(r"has a (\w+) and wants a (\w+)", text).groups()  # type: ignore[union-attr]
        assert (has if text.endswith("have?") else wants) in questions.KIND_WORDS[right]
    for text, right in drafts("properties"):
        subject = re.search(r"of the (\w+)\?", text).group(1)  # type: ignore[union-attr]
        word = re.search(rf"[Tt]he {subject} is (\w+)", text).group(1)  # type: ignore[union-attr]
        assert word in questions.PROPERTIES[right]


def test_word_problems_end_in_the_last_result_and_calculate_correctly() -> None:
    for row in islice(splits.stream("gsm8k", "test", 3), 500):
        chain, final = row["answer"].split("\n#### ")
        results = []
        for step in chain.split(", "):
            left, right = step.split("=")
            assert eval(left) == int(right) >= 0
            results.append(right)
        assert results[-1] == final


def replay(question: str) -> int:
    """The answer of a word problem, read from its sentences."""
    *sentences, _ = question.split(". ")
    first, *events = sentences
    numbers = [int(n) for n in re.findall(r"\d+", first)]
    name, value = first.split()[0], prod(numbers)
    for event in events:
        number = int(re.search(r"\d+", event).group())  # type: ignore[union-attr]
        if "times as large" in event:
            value *= number
        elif f"than {name}" in event:
            value += value + number if "more" in event else value - number
        elif event.startswith(name):
            value += number if re.search("buys|finds|gets", event) else -number
    return value


def test_replaying_a_word_problem_gives_its_answer() -> None:
    for row in islice(splits.stream("gsm8k", "dev", 4), 500):
        assert replay(row["question"]) == int(row["answer"].split("#### ")[1])


def test_nested_and_stepwise_forms_of_a_chain_agree() -> None:
    rng = Random(11)
    for _ in range(300):
        chain = programs.sample_chain(rng)
        scope: dict = {}
        exec(f"def f({chain.argument}):\n{chain.statements()}", scope)
        for value, result in programs.sample_tests(rng, chain, 2) or []:
            assert repr(scope["f"](eval(value))) == result
