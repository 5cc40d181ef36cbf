"""Protocols: named, frozen ways to evaluate, without whose name a score means nothing.

Each task has its profile for a protocol in its own file. A profile is data alone, so that its hash
shows whether two scores were made the same way. The code that it depends on (a reader, a program's
assembly) is versioned with it: a change of either means a new version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from semalign.errors import UserError
from semalign.registry import Registry
from semalign.tasks.profile import LIBRARY, Profile
from semalign.tasks.registry import BUILT_IN, TASKS, find_task


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A version of one profile a task.

    ``base`` is the name under which tasks have their profiles. ``changes`` replaces fields of all
    of them, ``code`` fields of those of code tasks, and so does ``sampling``, with the number of
    samples and their temperature.
    """

    base: str
    version: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the protocol, with the sampling where it has one of its own."""
        if not self.sampling:
            return self.base
        n, temperature, top_p, k = (
            self.sampling[key] for key in ("n", "temperature", "top_p", "k")
        )
        return f"{self.base}+n{n}t{temperature:g}p{top_p:g}k{k}"

    @property
    def profiles(self) -> dict[str, Profile]:
        """The profiles of the built-in tasks that have one for this protocol, by task."""
        return {name: self.profile(name) for name in BUILT_IN if self.base in TASKS[name].profiles}

    def profile(self, task: str) -> Profile:
        """The task's profile for this protocol, else the task's profile for all protocols.

        Raises UserError for an unknown task and for one that has neither.
        """
        found = find_task(task)
        profile = found.profiles.get(self.base, found.profile)
        if profile is None:
            raise UserError(
                f"protocol '{self.name}' has no profile for {task}; "
                f"it has {', '.join(self.profiles)}"
            )
        if profile.library:  # as the library has it
            return profile
        changes = {**self.changes, **self.code, **self.sampling}
        return replace(profile, **(changes if found.kind == "code" else self.changes))

    def label(self, task: str) -> str:
        """``name-version@hash`` of the task's profile; part of every record."""
        return f"{self.name}-{self.version}@{_digest(self.version, self.profile(task))[:12]}"

    @property
    def hash(self) -> str:
        """SHA-256 of the version and of ``profiles``; profiles for all protocols do not count."""
        profiles = self.profiles
        return _digest(self.version, *(profiles[task] for task in sorted(profiles)))

    def sampled(self, *, n: int, temperature: float, top_p: float, k: int) -> Protocol:
        """The same protocol with ``n`` samples of every code task, under a name that shows it.

        Raises UserError when pass@k cannot be estimated from n samples.
        """
        if not 1 <= k <= n:
            raise UserError(f"sampling.k={k}: pass@{k} needs at least {k} samples, sampling.n={n}")
        sampling = {"n": n, "temperature": temperature, "top_p": top_p, "k": k}
        return replace(self, sampling=sampling)


def _digest(version: int, *profiles: Profile) -> str:
    content: list[Any] = [version]
    for profile in profiles:
        library = (LIBRARY / profile.library).read_text() if profile.library else ""
        fields = asdict(profile)
        if not profile.strip:  # a later field: what does not use it keeps its hash
            del fields["strip"]
        content.append([fields, library])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


PROTOCOLS: Registry[Protocol] = Registry("protocol")


def register_protocol(protocol: Protocol) -> Protocol:
    """Add a protocol as ``name-version`` and, as its newest version, under its name; returns it."""
    PROTOCOLS.register(protocol.name, protocol)
    return PROTOCOLS.register(f"{protocol.name}-{protocol.version}", protocol)


# What version 2 changes: the published prompts end in a newline, which GPT-2's kind of tokenizer
# joins with the indentation after it, and chat models put their code into a fence.
_REPAIRED: Mapping[str, Any] = {"changes": {"strip": True}, "code": {"reader": "first-fence"}}

for _protocol in (
    # Zero-shot, greedy, one sample: the four tasks, complete.
    Protocol(base="paper", version=1),
    Protocol(base="paper", version=2, **_REPAIRED),
    # The same questions in the tokenizer's own chat template, for models tuned to chat.
    Protocol(base="paper-chat", version=1),
    Protocol(base="paper-chat", version=2, **_REPAIRED),
    # What Seeking and LaTen report to have used, as the suite was before its evaluation was removed
    # in 2025. MBPP there was MBPP+; here it is the published test split.
    Protocol(base="open-instruct", version=1),
    # The prompts, filters and metrics of lm_eval's gsm8k_cot_zeroshot and mmlu, by lm_eval itself.
    Protocol(base="lm-eval", version=1),
):
    register_protocol(_protocol)


def find_protocol(name: str) -> Protocol:
    """The protocol of that name, the newest version unless the name ends in one; UserError with the
    nearest name otherwise.
    """
    return PROTOCOLS.find(name)
