"""Evaluation without an engine: examples -> requests, and generations -> judged records."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from semalign.errors import UserError
from semalign.stages.records import Record
from semalign.tasks import TASKS, Example
from semalign.tasks.mmlu import LETTERS
from semalign.tasks.sandbox import WEAKEST, run


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What an engine is asked for one item; greedy unless ``temperature`` is above 0.

    With ``choice_ids`` only the next-token scores of those ids are wanted, and no text.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    choice_ids: tuple[int, ...] | None = None
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What an engine answered: ``n`` texts with their token ids, or one score a choice id."""

    texts: tuple[str, ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()
    choice_scores: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """How generated code runs: ``workers`` programs at a time in one process.

    A run waits more than it computes (the kernel makes and ends namespaces), hence several a core.
    """

    timeout_s: float = 3.0
    memory_mb: int = 512
    min_tier: int = WEAKEST
    workers: int = 8


def requests(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_model_len: int,
    n: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[GenerationRequest]:
    """One request an example, as token ids: special tokens are added once, by the tokenizer.

    Raises UserError for a prompt that leaves no room to answer, and for a tokenizer that does not
    give each letter of a choice task a token of its own.
    """
    made = []
    choices: dict[str, tuple[int, ...]] = {}
    prompts = tokenizer([example.prompt for example in examples])["input_ids"] if examples else []
    for example, prompt_ids in zip(examples, prompts, strict=True):
        task = TASKS[example.task]
        if (room := max_model_len - len(prompt_ids)) < 1:
            raise UserError(
                f"{example.id}: the prompt has {len(prompt_ids)} tokens, "
                f"evaluation.max_model_len is {max_model_len}"
            )
        if task.kind == "choice" and task.name not in choices:
            choices[task.name] = choice_ids(example.prompt, tokenizer)
        made.append(
            GenerationRequest(
                id=example.id,
                prompt_ids=tuple(prompt_ids),
                max_tokens=min(task.max_tokens, room),
                stop=task.stop,
                choice_ids=choices.get(task.name),
                n=1 if task.kind == "choice" else n,
                temperature=temperature,
                top_p=top_p,
            )
        )
    return made


def choice_ids(prompt: str, tokenizer: Any) -> tuple[int, ...]:
    """The token of each letter as it stands after the prompt, which is not the bare letter's."""
    answers = [f" {letter}" for letter in LETTERS]
    joined = tokenizer([prompt, *(prompt + answer for answer in answers)])["input_ids"]
    prefix, continuations = joined[0], joined[1:]
    ids = [tokens[-1] for tokens in continuations]
    extends = all(tokens[: len(prefix)] == prefix for tokens in continuations)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not extends or len(set(ids)) != len(ids) or unknown in ids:
        raise UserError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')} does not give "
            f"{', '.join(map(repr, answers))} each a token of its own after 'Answer:'"
        )
    return tuple(ids)


def judge(
    examples: Sequence[Example],
    generations: Sequence[Generation],
    *,
    split: str,
    sandbox: SandboxLimits,
) -> list[Record]:
    """One record an output, in the order of the examples; code runs in the sandbox."""
    jobs = [
        (example, generation, sample)
        for example, generation in zip(examples, generations, strict=True)
        for sample in range(1 if generation.choice_scores else len(generation.texts))
    ]
    with ThreadPoolExecutor(sandbox.workers) as pool:
        return list(pool.map(lambda job: _judge_one(*job, split=split, sandbox=sandbox), jobs))


def _judge_one(
    example: Example, generation: Generation, sample: int, *, split: str, sandbox: SandboxLimits
) -> Record:
    task = TASKS[example.task]
    begin = time.perf_counter()
    extracted, reason, tier = None, "", None
    if scores := generation.choice_scores:
        output, tokens = f" {LETTERS[max(range(len(scores)), key=scores.__getitem__)]}", []
    else:
        output, tokens = generation.texts[sample], list(generation.token_ids[sample])
    if task.kind == "code":
        verdict = run(
            task.program(output, example.row),
            timeout_s=sandbox.timeout_s,
            memory_mb=sandbox.memory_mb,
            min_tier=sandbox.min_tier,
        )
        correct, reason, tier = verdict.passed, verdict.reason, verdict.tier
    else:
        extracted = task.extract(output, example.row)
        correct = task.correct(extracted, example.row)
    return Record(
        task=task.name,
        split=split,
        id=example.id,
        sample=sample,
        prompt_hash=hashlib.sha256(example.prompt.encode()).hexdigest()[:16],
        output=output,
        tokens=tokens,
        extracted=extracted,
        correct=correct,
        reason=reason,
        tier=tier,
        seconds=time.perf_counter() - begin,
    )
