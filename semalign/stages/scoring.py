"""Evaluation without an engine: examples -> requests, and generations -> judged records."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from semalign.artifacts.records import Record
from semalign.config.sections import Evaluation, Sandbox
from semalign.data.chat import BY_PROTOCOL, BY_ROWS, chat_text
from semalign.data.likelihood import Span, Spans
from semalign.data.tokens import prompt_ids, starts
from semalign.errors import UserError, one_line
from semalign.sandbox.run import run
from semalign.tasks import TASKS, Example, Row, Task, lm_harness
from semalign.tasks.extraction import CODE_READERS, has_code
from semalign.tasks.protocols import Profile, Protocol, find_protocol
from semalign.tasks.task import cut, render


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A request to an engine for one item; greedy unless ``temperature`` is above 0.

    With ``choice_ids`` only the next-token scores of those ids are wanted, and no text; with
    ``spans`` only the log-probability of each, which is a text's ids and where the scored ones
    begin, counted from 0. ``seed`` makes samples repeatable. ``truncated``: the start of the prompt
    did not fit and was cut off.
    ``joined``: the prompt's ids are no start of those of prompt and reference answer.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    choice_ids: tuple[int, ...] | None = None
    spans: tuple[Span, ...] = ()
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    truncated: bool = False
    joined: bool = False


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What an engine answered: ``n`` texts with their token ids, or one score a choice id or span.

    ``unfinished``: of each text, whether the limit of tokens ended it; ``greedy``: of each span,
    whether greedy decoding would have given it.
    """

    texts: tuple[str, ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()
    unfinished: tuple[bool, ...] = ()
    choice_scores: tuple[float, ...] | None = None
    greedy: tuple[bool, ...] = ()


def chosen_protocol(settings: Evaluation) -> Protocol:
    """The protocol that the settings name, with their sampling.

    Raises UserError when there is none of that name, or one of the tasks is not in it.
    """
    protocol = find_protocol(settings.protocol)
    if settings.sampling is not None:
        protocol = protocol.sampled(**settings.sampling.model_dump())
    for task in settings.tasks:
        protocol.profile(task)
    return protocol


@dataclass(frozen=True)
class _Question:
    """The request for one example, still as text."""

    text: str
    choices: tuple[str, ...]
    stop: tuple[str, ...]
    max_tokens: int
    scored: tuple[tuple[str, str], ...] = ()  # (context, text) whose log-probability is wanted


def requests(
    examples: Sequence[Example], tokenizer: Any, protocol: Protocol, *, max_model_len: int
) -> list[GenerationRequest]:
    """One request an example of one task, as token ids.

    Special tokens are added once: by the chat template where the profile has one, else by the
    tokenizer (see `prompt_ids`, which training uses too). The answer gets ``max_tokens``, or what
    the prompt leaves of ``max_model_len``; a prompt that leaves less than both ``max_tokens`` and
    half of it is cut from the left.

    Raises UserError for a tokenizer without the chat template that the profile wants, and for one
    that does not give each choice a token of its own.
    """
    if not examples:
        return []
    profile = protocol.profile(examples[0].task)
    questions = _questions(examples, tokenizer, profile)
    special = profile.chat != "template"
    if questions[0].scored:
        spans = Spans(tokenizer, special, max_model_len - 1)
        return [
            _scored_request(example, question, spans)
            for example, question in zip(examples, questions, strict=True)
        ]
    texts = [question.text for question in questions]
    strip = profile.strip and (profile.chat == "none" or bool(profile.prefix))  # else a template's
    ids = prompt_ids(texts, tokenizer, strip=strip, special=special)
    answers = [text + example.answer for text, example in zip(texts, examples, strict=True)]
    answered = prompt_ids(answers, tokenizer, strip=False, special=special)
    choices = questions[0].choices
    scored = choice_ids(texts[0], choices, tokenizer, special) if choices else None
    made = []
    for example, question, prompt, joint in zip(examples, questions, ids, answered, strict=True):
        wanted = 1 if choices else question.max_tokens
        room = max_model_len - min(wanted, max_model_len // 2)
        made.append(
            GenerationRequest(
                id=example.id,
                prompt_ids=tuple(prompt[-room:]),
                max_tokens=min(wanted, max_model_len - min(len(prompt), room)),
                stop=question.stop,
                choice_ids=scored,
                n=1 if choices else profile.n,
                temperature=0.0 if choices else profile.temperature,
                top_p=profile.top_p,
                seed=int(hashlib.sha256(example.id.encode()).hexdigest()[:8], 16) >> 1,
                truncated=len(prompt) > room,
                joined=not starts(joint, prompt),
            )
        )
    return made


def _questions(examples: Sequence[Example], tokenizer: Any, profile: Profile) -> list[_Question]:
    task = TASKS[examples[0].task]
    end = (tokenizer.eos_token,) if tokenizer.eos_token else ()  # lm_eval stops at its text too
    if profile.library:
        library = lm_harness.library_requests(task.name, [example.row for example in examples])
        return [
            _Question(item.prompt, item.choices, (*item.stop, *end), item.max_tokens)
            for item in library
        ]
    requested = [task.request(example.row) for example in examples]
    return [
        _own_question(example, task, tokenizer, profile)
        if request is None
        else _Question(
            request.prompt, (), (*request.stop, *end), request.max_tokens, request.scored
        )
        for example, request in zip(examples, requested, strict=True)
    ]


def _own_question(example: Example, task: Task, tokenizer: Any, profile: Profile) -> _Question:
    text = _turn(example.row, task, tokenizer, profile)
    text += render(profile.prefix, task.values(example.row))
    scored = tuple((text, choice) for choice in task.continuations(example.row))
    return _Question(text, profile.choices, profile.stop, profile.max_tokens, scored)


def _turn(row: Row, task: Task, tokenizer: Any, profile: Profile) -> str:
    """The prompt as a user's turn, or as the turns of a chat, up to where the answer begins."""
    if messages := task.messages(row):
        return chat_text(messages[:-1], tokenizer, wanted=BY_ROWS)
    prompt = render(profile.prompt, task.values(row))
    if profile.chat == "none":
        return prompt
    if profile.chat == "tulu":
        return f"<|user|>\n{prompt}\n<|assistant|>\n"
    return user_turn(prompt, tokenizer)


def user_turn(prompt: str, tokenizer: Any) -> str:
    """The prompt as the tokenizer's chat template renders it, up to where the answer begins.

    Raises UserError as `chat_text` does.
    """
    return chat_text([{"role": "user", "content": prompt}], tokenizer, wanted=BY_PROTOCOL)


def _scored_request(example: Example, question: _Question, spans: Spans) -> GenerationRequest:
    """The log-probability of each continuation: next-token scores where each is a token of its own
    after the same ids. Raises UserError for one of several that is too long to be scored at once.
    """
    found = [spans.of(context, text) for context, text in question.scored]
    if len(found) > 1 and any(len(part.pieces) > 1 for part in found):
        raise UserError(
            f"{example.task}: a choice of {example.id} does not fit into max_model_len; expected "
            "shorter choices or a longer context"
        )
    cut = any(part.truncated for part in found)
    pieces = tuple(piece for part in found for piece in part.pieces)
    (ids, start), *_ = pieces
    ends = {piece[start:] for piece, _ in pieces}
    single = all(begin == start and piece[:start] == ids[:start] for piece, begin in pieces)
    single = single and TASKS[example.task].kind == "choice"
    if len(pieces) == len(ends) > 1 and single and all(len(end) == 1 for end in ends):
        tokens = tuple(piece[start] for piece, _ in pieces)
        return GenerationRequest(
            id=example.id, prompt_ids=ids[:start], max_tokens=1, choice_ids=tokens, truncated=cut
        )
    return GenerationRequest(
        id=example.id, prompt_ids=ids[:start], max_tokens=1, spans=pieces, truncated=cut
    )


def check_chat_template(tokenizer: Any) -> None:
    """Render one question. Raises UserError as `user_turn` does, and for a template that leaves the
    question out.
    """
    question = "What is 2 + 2?"
    if question not in (turn := user_turn(question, tokenizer)):
        raise UserError(
            f"the chat template of the tokenizer {tokenizer.name_or_path} leaves the question out: "
            f"it gives {one_line(turn, limit=100)!r}; choose a protocol without, such as "
            "protocol=paper"
        )


def choice_ids(
    prompt: str, choices: Sequence[str], tokenizer: Any, special: bool = True
) -> tuple[int, ...]:
    """The token of each choice as it stands after the prompt, which is not the bare letter's."""
    texts = [prompt, *(prompt + choice for choice in choices)]
    prefix, *joined = tokenizer(texts, add_special_tokens=special)["input_ids"]
    ids = [tokens[-1] for tokens in joined]
    extends = all(tokens[:-1] == prefix for tokens in joined)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not extends or len(set(ids)) != len(ids) or unknown in ids:
        raise UserError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')} does not give "
            f"{', '.join(map(repr, choices))} each a token of its own after 'Answer:'"
        )
    return tuple(ids)


@dataclass(frozen=True, kw_only=True)
class _Output:
    """One sample of one item."""

    example: Example
    request: GenerationRequest
    sample: int
    text: str
    tokens: tuple[int, ...] = ()
    unfinished: bool = False
    scores: tuple[float, ...] | None = None
    greedy: tuple[bool, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Judgement:
    extracted: str | None = None
    correct: bool
    score: float | None = None
    metrics: str | None = None
    reason: str = ""
    tier: int | None = None
    seconds: float


def judge(
    examples: Sequence[Example],
    requested: Sequence[GenerationRequest],
    generations: Sequence[Generation],
    *,
    split: str,
    protocol: Protocol,
    sandbox: Sandbox,
) -> list[Record]:
    """One record an output, in the order of the examples, which are of one task; code runs in the
    sandbox.
    """
    if not examples:
        return []
    task = TASKS[examples[0].task]
    profile, label = protocol.profile(task.name), protocol.label(task.name)
    outputs = [
        output
        for item in zip(examples, requested, generations, strict=True)
        for output in _outputs(*item, profile)
    ]
    return [
        Record(
            task=task.name,
            split=split,
            id=output.example.id,
            sample=output.sample,
            group=task.group(output.example.row),
            profile=label,
            prompt_hash=_hash(output.request.prompt_ids),
            truncated=output.request.truncated,
            joined=output.request.joined,
            output=output.text,
            tokens=list(output.tokens),
            unfinished=output.unfinished,
            choice_scores=None if output.scores is None else list(output.scores),
            **vars(judgement),
        )
        for output, judgement in zip(outputs, _judgements(outputs, profile, sandbox), strict=True)
    ]


def _outputs(
    example: Example, request: GenerationRequest, generation: Generation, profile: Profile
) -> Iterator[_Output]:
    if (scores := generation.choice_scores) is not None:
        task = TASKS[example.task]
        choices = profile.choices or task.continuations(example.row)
        text = choices[task.best(scores, choices)] if task.kind == "choice" else ""
        yield _Output(
            example=example,
            request=request,
            sample=0,
            text=text,
            scores=scores,
            greedy=generation.greedy,
        )
        return
    samples = zip(generation.texts, generation.token_ids, generation.unfinished, strict=True)
    for sample, (text, tokens, unfinished) in enumerate(samples):
        yield _Output(
            example=example,
            request=request,
            sample=sample,
            text=text,
            tokens=tokens,
            unfinished=unfinished,
        )


def compares_texts(task: str, profile: Profile) -> bool:
    """Whether judging only compares texts and numbers here: it runs no code, and nobody else's."""
    return not profile.library and TASKS[task].kind not in ("code", "lm_eval")


def _judgements(outputs: Sequence[_Output], profile: Profile, sandbox: Sandbox) -> list[_Judgement]:
    if profile.library:
        return _by_library(outputs)
    if TASKS[outputs[0].example.task].kind == "lm_eval":
        return _by_lm_eval(outputs)
    if TASKS[outputs[0].example.task].kind == "code":
        with ThreadPoolExecutor(sandbox.num_workers) as pool:
            return list(pool.map(lambda output: _by_tests(output, profile, sandbox), outputs))
    return [_by_reading(output, profile) for output in outputs]


def _by_library(outputs: Sequence[_Output]) -> list[_Judgement]:
    begin = time.perf_counter()
    rows = [output.example.row for output in outputs]
    answers = [output.text if output.scores is None else output.scores for output in outputs]
    judged = lm_harness.library_verdicts(outputs[0].example.task, rows, answers)
    each = (time.perf_counter() - begin) / len(outputs)
    return [_Judgement(extracted=j.extracted, correct=j.correct, seconds=each) for j in judged]


def _by_lm_eval(outputs: Sequence[_Output]) -> list[_Judgement]:
    begin = time.perf_counter()
    task, rows = TASKS[outputs[0].example.task], [output.example.row for output in outputs]
    found = task.verdicts(rows, [_answer(output) for output in outputs])
    each = (time.perf_counter() - begin) / len(outputs)
    return [_Judgement(**vars(verdict), seconds=each) for verdict in found]


def _answer(output: _Output) -> str | list[tuple[float, bool]]:
    """A text, or the log-probability of each text that was requested; windows are added up."""
    if output.scores is None:
        return output.text
    if len(output.example.row["scored"]) == 1:
        return [(sum(output.scores), all(output.greedy))]
    return list(zip(output.scores, output.greedy, strict=True))


def _by_tests(output: _Output, profile: Profile, sandbox: Sandbox) -> _Judgement:
    example = output.example
    code = CODE_READERS[profile.reader](cut(output.text, output.request.stop))
    verdict = run(
        TASKS[example.task].program(code, example.row),
        timeout_s=profile.timeout_s,
        memory_mb=profile.memory_mb,
        min_tier=sandbox.min_tier,
    )
    return _Judgement(
        extracted=code if has_code(code) else None,
        correct=verdict.passed,
        reason=verdict.reason,
        tier=verdict.tier,
        seconds=verdict.seconds,
    )


def _by_reading(output: _Output, profile: Profile) -> _Judgement:
    begin = time.perf_counter()
    task, row = TASKS[output.example.task], output.example.row
    extracted: str | None = None
    score = None
    if output.scores is not None and task.kind == "likelihood":
        extracted, correct = "", False
        score = sum(output.scores) / len(task.answer(row).encode())
    elif output.scores is not None:
        extracted = output.text.strip()
        correct = output.text == task.answer(row)
    else:
        reader = task.readers[profile.reader]
        extracted = reader.extract(cut(output.text, output.request.stop))
        correct = reader.correct(extracted, row)
        score = reader.grade(extracted, row) if reader.grade else None
    seconds = time.perf_counter() - begin
    return _Judgement(extracted=extracted, correct=correct, score=score, seconds=seconds)


def _hash(ids: Sequence[int]) -> str:
    return hashlib.sha256(repr(tuple(ids)).encode()).hexdigest()[:16]
