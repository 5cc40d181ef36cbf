"""Word problems in the schema of GSM8K: question, answer (a rationale, then `#### n`)."""

from __future__ import annotations

from random import Random

from semalign.tasks.task import Row

PEOPLE = ("Ann", "Ben", "Eva", "Max", "Sue", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens")
GAINS = ("buys {n} more", "finds {n} more", "gets {n} from {other}")
LOSSES = ("gives {n} to {other}", "loses {n}", "sells {n}")
STARTS_AND_CHANGES = ((20, 9), (20, 9), (60, 40))
"""The largest first number of a story, and the largest number gained or lost."""
LARGEST = 200
"""Nobody owns more things than this before the closing question."""


class Story:
    """Sentences, the calculations so far, and the number of things that the last one gave."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.name, self.other = rng.sample(PEOPLE, 2)
        self.thing, self.distraction = rng.sample(THINGS, 2)
        self.start, self.change = rng.choice(STARTS_AND_CHANGES)
        self.sentences: list[str] = []
        self.chain: list[str] = []
        self.value = 0

    def add(self, sentence: str) -> None:
        self.sentences.append(sentence[0].upper() + sentence[1:] + ".")

    def compute(self, sign: str, number: int) -> None:
        result = {"+": self.value + number, "-": self.value - number, "*": self.value * number}
        self.chain.append(f"{self.value}{sign}{number}={result[sign]}")
        self.value = result[sign]

    def begin(self) -> None:
        if self.rng.random() < 0.3:
            boxes, each = self.rng.randint(2, 9), self.rng.randint(2, 9)
            self.add(f"{self.name} has {boxes} boxes with {each} {self.thing} each")
            self.value = boxes
            self.compute("*", each)
        else:
            self.value = self.rng.randint(2, self.start)
            self.add(f"{self.name} has {self.value} {self.thing}")

    def event(self) -> None:
        """One gain, loss or multiplication; the value stays between 1 and LARGEST."""
        kind = self.rng.random()
        if kind < 0.2 and self.value <= LARGEST // 4:
            factor = self.rng.randint(2, 4)
            self.add(f"then the number of {self.thing} becomes {factor} times as large")
            self.compute("*", factor)
            return
        gain = (kind < 0.6 or self.value < 3) and self.value < LARGEST - 1
        most = LARGEST - self.value if gain else self.value - 1
        number = self.rng.randint(1, min(self.change, most))
        phrase = self.rng.choice(GAINS if gain else LOSSES)
        self.add(f"{self.name} {phrase.format(n=number, other=self.other)}")
        self.compute("+" if gain else "-", number)

    def distract(self) -> None:
        self.add(f"{self.other} has {self.rng.randint(2, self.start)} {self.distraction}")

    def close(self) -> str:
        """The closing question, which may be about two people together."""
        if self.rng.random() < 0.25 and self.value > 2:
            own, number = self.value, self.rng.randint(1, min(self.change, self.value - 1))
            word, sign = self.rng.choice((("more", "+"), ("fewer", "-")))
            self.add(f"{self.other} has {number} {self.thing} {word} than {self.name}")
            self.compute(sign, number)
            self.compute("+", own)
            return f"How many {self.thing} do they have together?"
        return f"How many {self.thing} does {self.name} have now?"


def word_problem(rng: Random) -> tuple[str, Row]:
    """One word problem of one to five calculations; its text is the key that decides its split."""
    story = Story(rng)
    story.begin()
    events = rng.choice((1, 2, 2, 3, 3))
    distraction = rng.randrange(events) if rng.random() < 0.3 else None
    for index in range(events):
        if index == distraction:
            story.distract()
        story.event()
    closing = story.close()  # may add a sentence, so it comes before the join
    text = " ".join([*story.sentences, closing])
    return text, {"question": text, "answer": f"{', '.join(story.chain)}\n#### {story.value}"}
