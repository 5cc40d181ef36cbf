"""MMLU (Hendrycks et al. 2021): four choices in 57 subjects."""

from __future__ import annotations

from types import MappingProxyType

from semalign.tasks.profile import LibraryTask, Profile, Published
from semalign.tasks.task import Row, Task

MMLU_LETTERS = ("A", "B", "C", "D")

_ANSWERS = tuple(f" {letter}" for letter in MMLU_LETTERS)
_OPTIONS = "A. {{ choices[0] }}\nB. {{ choices[1] }}\nC. {{ choices[2] }}\nD. {{ choices[3] }}\n"
_QUESTION = f"Question: {{{{ question }}}}\n{_OPTIONS}"


class Mmlu(Task):
    name = "mmlu"
    kind = "choice"
    metric = "accuracy"
    schema = MappingProxyType({"question": str, "subject": str, "choices": list, "answer": int})
    template = f"{_QUESTION}Answer:"
    library = LibraryTask(file="mmlu.yaml", metric="acc", filter="none")
    profiles = MappingProxyType(
        {
            "paper": Profile(prompt=template, choices=_ANSWERS),
            "paper-chat": Profile(
                prompt=template.removesuffix("\nAnswer:"),
                prefix="Answer:",
                chat="template",
                choices=_ANSWERS,
            ),
            # Two spaces after "about" are the suite's own.
            "open-instruct": Profile(
                prompt="The following are multiple choice questions (with answers) about  "
                "{{ subject | replace('_', ' ') }}.\n\n{{ question }}\n" + _OPTIONS + "Answer:",
                prefix="The answer is:",
                chat="tulu",
                choices=_ANSWERS,
            ),
            "lm-eval": Profile(library=library.file, choices=_ANSWERS),
        }
    )
    # Sizes: Hendrycks et al. 2021.
    published = Published(
        hub=("cais/mmlu", "all"),
        prefix="mmlu",
        splits={"test": range(14042), "validation": range(1531), "dev": range(285)},
    )

    def answer(self, row: Row) -> str:
        return f" {MMLU_LETTERS[row['answer']]}"

    def check(self, row: Row) -> str | None:
        choices, count = row["choices"], len(MMLU_LETTERS)
        if len(choices) != count or not all(isinstance(choice, str) for choice in choices):
            return f"field 'choices' must be {count} strings"
        if not 0 <= row["answer"] < count:
            return f"field 'answer' must be 0 to {count - 1}, found {row['answer']}"
        return None

    def group(self, row: Row) -> str | None:
        return str(row["subject"])
