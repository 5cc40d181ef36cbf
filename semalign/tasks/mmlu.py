"""MMLU (Hendrycks et al. 2021): four choices in 57 subjects."""

from __future__ import annotations

from types import MappingProxyType

from semalign.tasks.task import Row, Task

LETTERS = ("A", "B", "C", "D")


class Mmlu(Task):
    name = "mmlu"
    kind = "choice"
    metric = "accuracy"
    schema = MappingProxyType({"question": str, "subject": str, "choices": list, "answer": int})
    template = (
        "Question: {{ question }}\n"
        "A. {{ choices[0] }}\nB. {{ choices[1] }}\nC. {{ choices[2] }}\nD. {{ choices[3] }}\n"
        "Answer:"
    )

    def id(self, row: Row, index: int) -> str:
        return f"mmlu/{index}"

    def answer(self, row: Row) -> str:
        return f" {LETTERS[row['answer']]}"

    def check(self, row: Row) -> str | None:
        choices = row["choices"]
        if len(choices) != len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
            return f"field 'choices' must be {len(LETTERS)} strings"
        if not 0 <= row["answer"] < len(LETTERS):
            return f"field 'answer' must be 0 to {len(LETTERS) - 1}, found {row['answer']}"
        return None

    def group(self, row: Row) -> str | None:
        return str(row["subject"])
