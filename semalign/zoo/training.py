"""Training of the zoo's models on endless rows: cross-entropy of the answers, Muon and AdamW.

B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from semalign.tasks import TASKS, Example
from semalign.zoo.splits import stream

_log = logging.getLogger(__name__)
IGNORED = -100
MULTIPLE = 16
"""Lengths are rounded up to this, because kernels are compiled per shape."""
WARM_UP, DECAY = 0.04, 0.4
"""Shares of all steps in which the learning rate rises, and in which it falls to zero."""


def examples(task: str, seed: int) -> Iterator[Example]:
    """Endless pretraining prompts and answers of a task."""
    for index, row in enumerate(stream(task, "pretrain", seed)):
        yield TASKS[task].example(row, index)


def collate(
    batch: Sequence[Example], tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and labels (B, T), padded on the right, where causal attention needs no mask.

    The label at a position is the token after it: the answer's tokens and EOS, else IGNORED.
    """
    prompts = tokenizer([example.prompt for example in batch])["input_ids"]
    answers = tokenizer([example.answer for example in batch])["input_ids"]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    length = -(-longest // MULTIPLE) * MULTIPLE
    ids = torch.full((len(batch), length), tokenizer.pad_token_id)
    labels = torch.full((len(batch), length), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = [*prompt, *answer]
        ids[row, : len(text)] = torch.tensor(text)
        labels[row, len(prompt) - 1 : len(text)] = torch.tensor([*answer, tokenizer.eos_token_id])
    return ids.to(device), labels.to(device)


def labelled_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled positions; only they go through the LM head.

    The layers run in bfloat16, the LM head, whose input varies in length, in float32.
    """
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    supervised = labels != IGNORED
    logits = model.lm_head(hidden[supervised].float())
    return nn.functional.cross_entropy(logits, labels[supervised])


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, constant, linear decay to zero."""
    done = (step + 1) / steps
    return min(1.0, done / WARM_UP, (1.0 - step / steps) / DECAY)


def make_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, LM head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    taken = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    rows: Mapping[str, int],
    learning_rate: float,
    seed: int,
) -> float:
    """Train in place on `rows[task]` rows of each task a step, every task with equal weight.

    Returns the wall-clock seconds.
    """
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, learning_rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: learning_rate_factor(step, steps))
        for o in optimizers
    ]
    sources = {task: examples(task, seed) for task in rows}
    model.train_model()
    start, means = time.perf_counter(), dict.fromkeys(rows, 0.0)
    for step in range(1, steps + 1):
        for task, source in sources.items():
            ids, labels = collate(list(islice(source, rows[task])), tokenizer, device)
            loss = labelled_loss(model, ids, labels)
            (loss / len(rows)).backward()
            means[task] += 0.02 * (loss.item() - means[task])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        if step % 50 == 0 or step == steps:
            shown = " ".join(f"{task} {mean:.3f}" for task, mean in means.items())
            _log.info("step %d/%d, %.0f s, %s", step, steps, time.perf_counter() - start, shown)
    return time.perf_counter() - start
