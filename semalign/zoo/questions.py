"""Multiple-choice questions in the schema of MMLU: question, subject, four choices, answer.

The choices of a subject are always the same four in the same order: models of the zoo's size do
not learn, within its budget, to look a letter up among shuffled choices.
"""

from __future__ import annotations

from random import Random

from semalign.tasks.task import Row

Draft = tuple[str, int]
"""The question and the index of the right choice."""

KIND_WORDS = {
    "animal": ("dog", "cat", "horse", "mouse", "sheep", "lion", "bear", "goat"),
    "fruit": ("apple", "pear", "plum", "lemon", "grape", "peach", "cherry", "melon"),
    "tool": ("hammer", "saw", "drill", "spade", "rake", "axe", "wrench", "chisel"),
    "metal": ("iron", "gold", "silver", "copper", "zinc", "lead", "nickel", "tin"),
}
PROPERTIES = {
    "size": ("big", "small", "huge", "tiny"),
    "heat": ("hot", "cold", "warm", "icy"),
    "speed": ("fast", "slow", "rapid", "sluggish"),
    "age": ("old", "new", "ancient", "recent"),
}
LANDS = {
    "Arvia": ("Lumen", "Tessa", "Moren", "Pell", "Vista"),
    "Borland": ("Runa", "Sarto", "Nola", "Belmo", "Kest"),
    "Cavia": ("Ondra", "Zamor", "Calto", "Firen", "Dulma"),
    "Dorania": ("Harro", "Minto", "Selva", "Tarn", "Ulm"),
}
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
PERSONS = ("Ann", "Ben", "Eva", "Max")


def arithmetic(rng: Random) -> Draft:
    a, b, c = (rng.randint(1, 66) for _ in range(3))
    return f"What is {a}+{b}+{c}?", (a + b + c) // 50


def calendar(rng: Random) -> Draft:
    month, shift = rng.randrange(12), rng.randint(1, 6)
    word, sign = rng.choice((("after", 1), ("before", -1)))
    person = rng.choice(PERSONS)
    text = f"{person} was born {shift} months {word} {MONTHS[month]}. In which quarter is that?"
    return text, (month + sign * shift) % 12 // 3


def categories(rng: Random) -> Draft:
    things = [(word, index) for index, words in enumerate(KIND_WORDS.values()) for word in words]
    (one, first), (two, second) = rng.sample(things, 2)
    verb, answer = rng.choice((("have", first), ("want", second)))
    person = rng.choice(PERSONS)
    text = f"{person} has a {one} and wants a {two}. What kind of thing does {person} {verb}?"
    return text, answer


def comparison(rng: Random) -> Draft:
    limit = rng.choice((50, 50, rng.randint(20, 80)))
    numbers = [rng.randint(1, 99) for _ in range(3)]
    text = f"How many of {numbers[0]}, {numbers[1]}, {numbers[2]} are larger than {limit}?"
    return text, sum(n > limit for n in numbers)


def counting(rng: Random) -> Draft:
    word, odd = rng.choice((("even", 0), ("even", 0), ("odd", 1)))
    numbers = [rng.randint(1, 99) for _ in range(3)]
    text = f"How many of {numbers[0]}, {numbers[1]}, {numbers[2]} are {word}?"
    return text, sum(n % 2 == odd for n in numbers)


def geography(rng: Random) -> Draft:
    towns = [(town, index) for index, names in enumerate(LANDS.values()) for town in names]
    (one, first), (two, second) = rng.sample(towns, 2)
    word, answer = rng.choice((("start", first), ("end", second)))
    return f"{rng.choice(PERSONS)} goes from {one} to {two}. In which land is the {word}?", answer


def logic(rng: Random) -> Draft:
    order = rng.sample(range(4), 4)
    facts = [f"{PERSONS[order[i]]} is taller than {PERSONS[order[i + 1]]}." for i in range(3)]
    rng.shuffle(facts)
    word, answer = rng.choice((("tallest", order[0]), ("shortest", order[3])))
    return f"{' '.join(facts)} Who is the {word}?", answer


def properties(rng: Random) -> Draft:
    words = [(word, index) for index, group in enumerate(PROPERTIES.values()) for word in group]
    (one, first), (two, second) = rng.sample(words, 2)
    (a, b) = rng.sample([word for words in KIND_WORDS.values() for word in words], 2)
    subject, answer = rng.choice(((a, first), (b, second)))
    return f"The {a} is {one} and the {b} is {two}. What is told of the {subject}?", answer


NUMBERS = ("0", "1", "2", "3")
SUBJECTS = {
    "arithmetic": (arithmetic, ("below 50", "50 to 99", "100 to 149", "150 or more")),
    "calendar": (calendar, ("first", "second", "third", "fourth")),
    "categories": (categories, tuple(KIND_WORDS)),
    "comparison": (comparison, NUMBERS),
    "counting": (counting, NUMBERS),
    "geography": (geography, tuple(LANDS)),
    "logic": (logic, PERSONS),
    "properties": (properties, tuple(PROPERTIES)),
}


def question(rng: Random) -> tuple[str, Row]:
    """One question; its text is the key that decides its split."""
    subject = rng.choice(sorted(SUBJECTS))
    draft, choices = SUBJECTS[subject]
    text, answer = draft(rng)
    return text, {
        "question": text,
        "subject": subject,
        "choices": list(choices),
        "answer": answer,
    }
