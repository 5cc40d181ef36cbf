"""Right or wrong, per example, of a model in plain transformers: greedy decoding in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from semalign.sandbox import run as sandbox
from semalign.tasks import TASKS, Example
from semalign.tasks.protocols import find_protocol
from semalign.tasks.task import cut

PROTOCOL = find_protocol("paper-1")
LETTER_ANSWERS = (" A", " B", " C", " D")
LONGEST_ANSWER = 96
"""Tokens; the longest reference answer of the shipped rows has fewer."""
BATCH = 100


@torch.inference_mode()
def answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, batch: Sequence[Example]
) -> list[str]:
    """The model's answers to examples of one task: the likeliest letter, or greedy text."""
    prompts = [example.prompt for example in batch]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    inputs = inputs.to(next(model.parameters()).device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if TASKS[batch[0].task].kind == "choice":
        letters = [tokenizer(letter)["input_ids"][0] for letter in LETTER_ANSWERS]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -1, letters]
        return [LETTER_ANSWERS[best] for best in logits.argmax(-1).tolist()]
    tokens = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=LONGEST_ANSWER
    )
    return tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)


def is_right(example: Example, output: str) -> bool:
    """Whether an answer is correct; code is run in the sandbox, the reference answer excepted."""
    task, profile = TASKS[example.task], PROTOCOL.profile(example.task)
    output = cut(output, profile.stop)
    if task.kind == "choice":
        return output == example.answer
    if task.kind == "code":
        same = output.strip() == example.answer.strip()
        return same or sandbox.run(task.program(output, example.row)).passed
    reader = task.readers[profile.reader]
    return reader.correct(reader.extract(output), example.row)


def right_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> list[bool]:
    """Whether the model's answer to each example is right; the examples are of one task."""
    model.eval()
    verdicts: list[bool] = []
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        outputs = answers(model, tokenizer, batch)
        verdicts += map(is_right, batch, outputs)
    return verdicts
