"""MMLU (Hendrycks et al. 2021): four choices, scored by the next-token scores of the letters."""

from __future__ import annotations

import re
from types import MappingProxyType

from semalign.tasks.task import Example, Row, Task

_LETTER = re.compile(r"\s*([A-D])\b")
LETTERS = ("A", "B", "C", "D")


class Mmlu(Task):
    name = "mmlu"
    kind = "choice"
    metric = "accuracy"
    schema = MappingProxyType({"question": str, "subject": str, "choices": list, "answer": int})
    max_tokens = 1

    def check(self, row: Row) -> str | None:
        choices = row["choices"]
        if len(choices) != len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
            return f"field 'choices' must be {len(LETTERS)} strings"
        if not 0 <= row["answer"] < len(LETTERS):
            return f"field 'answer' must be 0 to {len(LETTERS) - 1}, found {row['answer']}"
        return None

    def example(self, row: Row, index: int) -> Example:
        choices = zip(LETTERS, row["choices"], strict=True)
        lines = "\n".join(f"{letter}. {choice}" for letter, choice in choices)
        return Example(
            id=f"mmlu/{index}",
            task=self.name,
            prompt=f"Question: {row['question']}\n{lines}\nAnswer:",
            answer=f" {LETTERS[row['answer']]}",
            row=row,
        )

    def extract(self, output: str, row: Row) -> str | None:
        found = _LETTER.match(output)
        return found.group(1) if found else None

    def correct(self, extracted: str | None, row: Row) -> bool:
        return extracted == LETTERS[row["answer"]]
