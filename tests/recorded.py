"""Records of a scored split, as tests need them."""

from __future__ import annotations

from semalign.artifacts.records import Record

PROFILE = "paper-1@3f2a9c"


def records(
    verdicts: str,
    task: str = "mmlu",
    split: str = "test",
    *,
    profile: str = PROFILE,
    samples: int = 1,
) -> list[Record]:
    """`++-`: two right and one wrong, `samples` of them to an item; MMLU's subjects take turns."""
    return [
        Record(
            task=task,
            split=split,
            id=f"{task}/{place // samples}",
            sample=place % samples,
            group=("sums", "logic")[place // samples % 2] if task == "mmlu" else None,
            profile=profile,
            prompt_hash="0",
            truncated=False,
            joined=False,
            output="",
            tokens=[],
            unfinished=False,
            choice_scores=None,
            extracted=None,
            correct=verdict == "+",
            reason="",
            tier=None,
            seconds=0.0,
        )
        for place, verdict in enumerate(verdicts)
    ]
