"""GSM8K (Cobbe et al. 2021): a written-out chain of thought that ends in ``#### number``."""

from __future__ import annotations

import re
import string
from decimal import Decimal
from types import MappingProxyType

from semalign.tasks.profile import LibraryTask, Profile, Published
from semalign.tasks.task import AnswerReader, Row, Task

_ANNOTATION = re.compile(r"<<[^<>]*>>")  # the calculator annotations of the published rationales
# A sign belongs to a number unless a digit stands before it ("16-3" ends in 3); commas only where
# they part thousands.
_NUMBER = re.compile(
    r"(?:(?<!\d)[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)", re.ASCII
)
_REFERENCE = re.compile(
    r"[$€£¥]?[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?<=[0-9])(?P<unit>.*?)[%.]?",
    re.DOTALL,
)
# Of a number written in several words, those before the last: "1 000", "- 5", "1 / 2".
_PART = re.compile("[-+±~/\N{MINUS SIGN}]|[0-9]+(?:[.,'/][0-9]+)*")
_LABEL = re.compile(r"^[^\W\d_]*[=:]")  # "x=5", "Answer:5"
_SCALES = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "third"}
_SUFFIXES = {"k", "K", "M", "B", "bn", "mn"}
_MARK = "####"


def final_number(text: str) -> str | None:
    """The number after the first ``####``, else the last number; thousands commas removed.

    None when there is no number, or nothing but words after ``####``.
    """
    before, mark, after = text.partition(_MARK)
    found = _NUMBER.search(after) if mark else None
    numbers = [found.group()] if found else [] if mark else _NUMBER.findall(before)
    return numbers[-1].replace(",", "") if numbers else None


def _is_number(reference: str) -> bool:
    """Whether a reference is one number, perhaps with a currency sign and a unit, with nothing left
    over that would make it another one: digits, a sign, a fraction, a power, "million".
    """
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        return False
    unit = found["unit"].strip()
    letters = all(c.isalpha() or c.isspace() or c in "'-/" for c in unit)
    words = {word.rstrip("s") for word in unit.lower().split()}
    return letters and unit[:1] not in set("'-/") and not (words & _SCALES or unit in _SUFFIXES)


def ends_in_a_number(answer: str) -> bool:
    """Whether a reference reads as `final_number` reads it: what stands after ``####``, or else
    around its last number, is one number with nothing left over that would make it another one.
    """
    _, mark, reference = answer.partition(_MARK)
    if mark:
        return _is_number(reference.strip())
    words = answer.split()
    last = max((i for i, word in enumerate(words) if re.search(r"[0-9]", word)), default=None)
    if last is None:
        return False
    first = last
    while first > 0 and _PART.fullmatch(words[first - 1]):
        first -= 1
    phrase = re.split(r"[.,;!?]\s", " ".join(words[first:]))[0]
    return _is_number(_LABEL.sub("", phrase))


def _same_number(extracted: str | None, row: Row) -> bool:
    reference = final_number(row["answer"])
    assert reference is not None, "read_rows has checked the reference"
    return extracted is not None and Decimal(extracted) == Decimal(reference)


def last_number(text: str) -> str:
    """Open-instruct's reading (its GSM8K evaluation as of 2025): commas between digits removed,
    then the last number; the whole text where there is none. ``-5`` is only a number with its sign
    in front of a point, so that it reads as 5.
    """
    joined = re.sub(r"(\d),(\d)", r"\1\2", text)
    numbers: list[str] = re.findall(r"[-+]?\d*\.\d+|\d+", joined)
    return numbers[-1] if numbers else joined


def _same_characters(extracted: str | None, row: Row) -> bool:
    """Open-instruct's exact match: case and punctuation do not count, so 24.00 is 2400."""
    reference = row["answer"].partition(_MARK)[2].strip().replace(",", "")
    return extracted is not None and _plain(extracted) == _plain(reference)


def _plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


class Gsm8k(Task):
    name = "gsm8k"
    kind = "text"
    metric = "accuracy"
    schema = MappingProxyType({"question": str, "answer": str})
    template = "Question: {{ question }}\nAnswer:"
    readers = MappingProxyType(
        {
            "final-number": AnswerReader(final_number, _same_number),
            "last-number": AnswerReader(last_number, _same_characters),
        }
    )
    library = LibraryTask(file="gsm8k.yaml", metric="exact_match", filter="flexible-extract")
    profiles = MappingProxyType(
        {
            "paper": Profile(prompt=template, stop=("\nQuestion:",), reader="final-number"),
            "paper-chat": Profile(
                prompt="{{ question }}\nThink step by step, then write #### and the number.",
                chat="template",
                reader="final-number",
            ),
            "open-instruct": Profile(
                prompt="Answer the following question.\n\nQuestion: {{ question }}",
                prefix="Answer:",
                chat="tulu",
                reader="last-number",
            ),
            "lm-eval": Profile(library=library.file, max_tokens=256),
        }
    )
    # Sizes: Cobbe et al. 2021.
    published = Published(
        hub=("openai/gsm8k", "main"),
        prefix="gsm8k",
        splits={"train": range(7473), "test": range(1319)},
    )

    def answer(self, row: Row) -> str:
        return f" {_ANNOTATION.sub('', row['answer'])}"

    def check(self, row: Row) -> str | None:
        _, mark, reference = row["answer"].partition(_MARK)
        if mark and _is_number(reference.strip()):
            return None
        found = f", found {_MARK + reference[:40]!r}" if mark else ""
        return f"field 'answer' must end in '{_MARK} number', such as 5, -5, 1,200 or $0.50{found}"
