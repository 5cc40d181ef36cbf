"""GSM8K (Cobbe et al. 2021): a written-out chain of thought that ends in ``#### number``."""

from __future__ import annotations

import re
from decimal import Decimal
from types import MappingProxyType

from semalign.tasks.task import Example, Row, Task

_ANNOTATION = re.compile(r"<<[^<>]*>>")  # the calculator annotations of the published rationales
# A sign belongs to a number unless a digit stands before it ("16-3" ends in 3); commas only where
# they part thousands.
_NUMBER = re.compile(
    r"(?:(?<!\d)[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)", re.ASCII
)
_MARK = "####"


class Gsm8k(Task):
    name = "gsm8k"
    kind = "text"
    metric = "accuracy"
    schema = MappingProxyType({"question": str, "answer": str})
    stop = ("\nQuestion:",)
    max_tokens = 512

    def check(self, row: Row) -> str | None:
        if _MARK in row["answer"] and final_number(row["answer"]) is not None:
            return None
        return f"field 'answer' must end in '{_MARK} number'"

    def example(self, row: Row, index: int) -> Example:
        return Example(
            id=f"gsm8k/{index}",
            task=self.name,
            prompt=f"Question: {row['question']}\nAnswer:",
            answer=f" {_ANNOTATION.sub('', row['answer'])}",
            row=row,
        )

    def extract(self, output: str, row: Row) -> str | None:
        return final_number(self.cut(output))

    def correct(self, extracted: str | None, row: Row) -> bool:
        reference = final_number(row["answer"])
        assert reference is not None, "read_rows has checked the reference"
        return extracted is not None and Decimal(extracted) == Decimal(reference)


def final_number(text: str) -> str | None:
    """The number after the first ``####``, else the last number; thousands commas removed.

    None when there is no number, or nothing but words after ``####``.
    """
    before, mark, after = text.partition(_MARK)
    found = _NUMBER.search(after) if mark else None
    numbers = [found.group()] if found else [] if mark else _NUMBER.findall(before)
    return numbers[-1].replace(",", "") if numbers else None
