"""HumanEval (Chen et al. 2021): complete a function from its signature and docstring."""

from __future__ import annotations

import keyword
from types import MappingProxyType

from semalign.sandbox.program import Program
from semalign.tasks.profile import (
    CODE_FENCE,
    COMPLETE_FUNCTION,
    TWENTY_SAMPLES,
    Profile,
    Published,
)
from semalign.tasks.task import Row, Task

_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # those of Chen et al. 2021, section 2.1


class HumanEval(Task):
    name = "humaneval"
    kind = "code"
    metric = "pass@1"
    epochs = 3
    lr = 3e-5
    schema = MappingProxyType(
        {
            "task_id": str,
            "prompt": str,
            "entry_point": str,
            "canonical_solution": str,
            "test": str,
        }
    )
    template = "{{ prompt }}"
    profiles = MappingProxyType(
        {
            "paper": Profile(prompt=template, stop=_STOP),
            "paper-chat": Profile(
                prompt=f"Complete this function:\n\n{CODE_FENCE}{{{{ prompt }}}}```",
                prefix=f"{CODE_FENCE}{{{{ prompt }}}}",
                chat="template",
                stop=(*_STOP, "\n```"),
            ),
            "open-instruct": Profile(
                prompt=f"{COMPLETE_FUNCTION}{{{{ prompt }}}}",
                prefix=f"Here is the function:\n\n{CODE_FENCE}{{{{ prompt }}}}",
                chat="tulu",
                stop=(*_STOP, "\n```"),
                **TWENTY_SAMPLES,
            ),
        }
    )
    # Size and ids: Chen et al. 2021.
    published = Published(
        hub=("openai/openai_humaneval", "openai_humaneval"),
        file="HumanEval",
        prefix="HumanEval",
        splits={"test": range(164)},
    )

    def id(self, row: Row, index: int) -> str:
        return str(row["task_id"])

    def answer(self, row: Row) -> str:
        return str(row["canonical_solution"])

    def check(self, row: Row) -> str | None:
        name = row["entry_point"]
        if name.isidentifier() and not keyword.iskeyword(name):
            return None
        return f"field 'entry_point' must be a Python identifier, found {name!r}"

    def program(self, output: str, row: Row) -> Program:
        # Helpers that the prompt defines and the tests call are the benchmark's, not the model's.
        return Program(
            solution=f"{row['prompt']}{output}\n",
            tests=f"{row['test']}\ncheck({row['entry_point']})\n",
            context=f"{row['prompt']}{row['canonical_solution']}\n",
            entry=(row["entry_point"],),
        )
