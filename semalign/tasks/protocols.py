"""Protocols: named, frozen ways to evaluate. A score means nothing without the name of its own.

A profile is data alone, so that its hash says whether two scores were made the same way. Whatever
code it leans on (a reader, a program's assembly) is versioned with it: a change of either means a
new version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from semalign.errors import UserError, nearest
from semalign.tasks import gsm8k, humaneval, mbpp, mmlu

LIBRARY = Path(__file__).with_name("lm_eval")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How one task is asked, decoded and judged.

    ``prompt`` and ``prefix``, the forced start of the answer, are Jinja templates over a row.
    ``chat`` is how a prompt becomes a turn: not at all, in Tulu's plain format, or by the
    tokenizer's own template. With ``choices`` the next-token score of each decides; otherwise text
    is generated: ``n`` samples, at most ``max_tokens``, up to a ``stop`` string, scored as
    pass@``k``. ``reader`` names how a text task's answer is read; ``timeout_s`` (wall clock) and
    ``memory_mb`` (address space) bound a program. ``library`` is the lm_eval task file that gives
    prompt, choices, stops and metric instead.
    """

    prompt: str = ""
    prefix: str = ""
    chat: Literal["none", "tulu", "template"] = "none"
    choices: tuple[str, ...] = ()
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    k: int = 1
    reader: str = ""
    timeout_s: float = 3.0
    memory_mb: int = 512
    library: str = ""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A profile for each task it knows."""

    name: str
    version: int
    profiles: Mapping[str, Profile]

    def profile(self, task: str) -> Profile:
        """The task's profile; UserError when the protocol has none."""
        if task not in self.profiles:
            raise UserError(
                f"protocol '{self.name}' does not say how to evaluate {task}; "
                f"it has {', '.join(self.profiles)}"
            )
        return self.profiles[task]

    def label(self, task: str) -> str:
        """``name-version@hash`` of the task's profile; part of every record."""
        return f"{self.name}-{self.version}@{_digest(self.version, self.profile(task))[:12]}"

    @property
    def hash(self) -> str:
        """SHA-256 of all profiles and the version."""
        return _digest(self.version, *(self.profiles[task] for task in sorted(self.profiles)))

    def sampled(self, *, n: int, temperature: float, top_p: float, k: int) -> Protocol:
        """The same protocol with ``n`` samples of every code task, under a name that says so.

        Raises UserError when pass@k cannot be estimated from n samples.
        """
        if not 1 <= k <= n:
            raise UserError(f"sampling.k={k}: pass@{k} needs at least {k} samples, sampling.n={n}")
        how: dict[str, Any] = {"n": n, "temperature": temperature, "top_p": top_p, "k": k}
        profiles = {
            task: replace(profile, **how) if task in ("humaneval", "mbpp") else profile
            for task, profile in self.profiles.items()
        }
        name = f"{self.name}+n{n}t{temperature:g}p{top_p:g}k{k}"
        return replace(self, name=name, profiles=MappingProxyType(profiles))


def _digest(version: int, *profiles: Profile) -> str:
    content: list[Any] = [version]
    for profile in profiles:
        library = (LIBRARY / profile.library).read_text() if profile.library else ""
        content.append([asdict(profile), library])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_LETTERS = tuple(f" {letter}" for letter in mmlu.LETTERS)

# Zero-shot, greedy, one sample: the four tasks, complete.
_PAPER = Protocol(
    name="paper",
    version=1,
    profiles=MappingProxyType(
        {
            "mmlu": Profile(prompt=mmlu.Mmlu.template, choices=_LETTERS),
            "gsm8k": Profile(prompt=gsm8k.Gsm8k.template, stop=gsm8k.STOP, reader="final-number"),
            "humaneval": Profile(prompt=humaneval.HumanEval.template, stop=humaneval.STOP),
            "mbpp": Profile(prompt=mbpp.Mbpp.template, stop=mbpp.STOP, timeout_s=10.0),
        }
    ),
)

_FENCE = "```python\n"

# The same questions in the tokenizer's own chat template, for models tuned to chat.
_PAPER_CHAT = Protocol(
    name="paper-chat",
    version=1,
    profiles=MappingProxyType(
        {
            "mmlu": Profile(
                prompt=mmlu.Mmlu.template.removesuffix("\nAnswer:"),
                prefix="Answer:",
                chat="template",
                choices=_LETTERS,
            ),
            "gsm8k": Profile(
                prompt="{{ question }}\nThink step by step, then write #### and the number.",
                chat="template",
                reader="final-number",
            ),
            "humaneval": Profile(
                prompt=f"Complete this function:\n\n{_FENCE}{{{{ prompt }}}}```",
                prefix=f"{_FENCE}{{{{ prompt }}}}",
                chat="template",
                stop=(*humaneval.STOP, "\n```"),
            ),
            "mbpp": Profile(
                prompt="{{ text }}\nIt must pass these tests:\n\n"
                f"{_FENCE}{{{{ test_list | join('\\n') }}}}\n```",
                prefix=_FENCE,
                chat="template",
                stop=("\n```",),
                timeout_s=10.0,
            ),
        }
    ),
)

_SAMPLED: dict[str, Any] = {"n": 20, "temperature": 0.1, "top_p": 0.95}
_COMPLETE = "Complete the following python function.\n\n\n"

# What Seeking and LaTen say they used, as the suite was before its evaluation was removed in 2025.
# Two spaces after "about" are its own. MBPP there was MBPP+; here it is the published test split.
_OPEN_INSTRUCT = Protocol(
    name="open-instruct",
    version=1,
    profiles=MappingProxyType(
        {
            "mmlu": Profile(
                prompt="The following are multiple choice questions (with answers) about  "
                "{{ subject | replace('_', ' ') }}.\n\n{{ question }}\n"
                "A. {{ choices[0] }}\nB. {{ choices[1] }}\nC. {{ choices[2] }}\n"
                "D. {{ choices[3] }}\nAnswer:",
                prefix="The answer is:",
                chat="tulu",
                choices=_LETTERS,
            ),
            "gsm8k": Profile(
                prompt="Answer the following question.\n\nQuestion: {{ question }}",
                prefix="Answer:",
                chat="tulu",
                reader="last-number",
            ),
            "humaneval": Profile(
                prompt=f"{_COMPLETE}{{{{ prompt }}}}",
                prefix=f"Here is the function:\n\n{_FENCE}{{{{ prompt }}}}",
                chat="tulu",
                stop=(*humaneval.STOP, "\n```"),
                **_SAMPLED,
            ),
            "mbpp": Profile(
                prompt=f"{_COMPLETE}{{{{ text }}}}\n{{{{ code.split(':')[0] }}}}",
                prefix=f"Here is the completed function:\n\n\n{_FENCE}",
                chat="tulu",
                stop=("```",),
                timeout_s=10.0,
                **_SAMPLED,
            ),
        }
    ),
)

# The prompts, filters and metrics of lm_eval's gsm8k_cot_zeroshot and mmlu, by lm_eval itself.
_LM_EVAL = Protocol(
    name="lm-eval",
    version=1,
    profiles=MappingProxyType(
        {
            "mmlu": Profile(library="mmlu.yaml", choices=_LETTERS),
            "gsm8k": Profile(library="gsm8k.yaml", max_tokens=256),
        }
    ),
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol for protocol in (_PAPER, _PAPER_CHAT, _OPEN_INSTRUCT, _LM_EVAL)
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name; UserError with the nearest one otherwise."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol '{name}' is unknown; {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
