"""Few labels, and wrong ones: which training examples carry an answer, and whose."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from semalign.config.sections import Data
from semalign.data.dataset import Dataset
from semalign.errors import UserError
from semalign.tasks import Example


def mislabel(examples: Sequence[Example], data: Data) -> list[Example]:
    """Give a share `data.label_noise` of the labelled examples the answer of another one.

    The other answer always differs from the example's own, and the share is of all labelled
    examples, rounded. The wrong ones are the same for every seed of a transfer: they belong to the
    data. Raises UserError when an example to be changed finds no other answer.
    """
    result = list(examples)
    labelled = range(len(result))[: data.labelled_limit]
    draw = random.Random(0)
    for index in sorted(draw.sample(labelled, round(data.label_noise * len(labelled)))):
        own = examples[index].answer
        others = [examples[i].answer for i in labelled if examples[i].answer != own]
        if not others:
            raise UserError(
                f"data.label_noise={data.label_noise}: all {len(labelled)} labelled examples have "
                f"the answer of {examples[index].id}; expected at least two different answers"
            )
        result[index] = replace(examples[index], answer=draw.choice(others))
    return result


def hide_labels(rows: Dataset, labelled: int | None) -> Dataset:
    """Only the first `labelled` examples keep their answers (None: all do); the others end with
    their prompt, so that no model reads what nobody has labelled.
    """
    if labelled is None or labelled >= len(rows):
        return rows
    return Dataset(
        example if i < labelled else replace(example, ids=example.ids[: example.prompt_length])
        for i, example in enumerate(rows)
    )
