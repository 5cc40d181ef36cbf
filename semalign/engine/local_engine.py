"""One vLLM engine in a process of its own, without Ray.

vLLM must not share a process with training: it binds memory and turns torch's threads off. So the
engine runs as `python -m semalign.engine.engine_process`, and the two processes exchange pickles
over a pipe that only they hold.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Pipe
from typing import Any

from tqdm.auto import tqdm

from semalign.config.sections import Evaluation
from semalign.engine.vllm_engine import ENGINE_ENVIRONMENT, lora_room
from semalign.errors import Failed
from semalign.models.loading import model_folder
from semalign.models.peft_folder import adapter_rank
from semalign.models.reference import Model
from semalign.stages.judged import Unit, adapters_of, batches, by_model, judge_batch


class LocalEngine:
    """A context that starts an engine and ends it; `generate` as `Engine.generate`."""

    def __init__(self, model: Model, settings: Evaluation, ranks: Sequence[int]) -> None:
        self._arguments = str(model_folder(model.path)), model, settings, lora_room(ranks)

    def __enter__(self) -> LocalEngine:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "semalign.engine.engine_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **ENGINE_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection.send(self._arguments)
        return self

    def generate(self, *arguments: Any) -> Any:
        try:
            self._connection.send(arguments)
            answer = self._connection.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            raise Failed(
                f"the engine's process ended with status {status} (-9: killed, as by a system that "
                "is out of memory)"
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.wait()


def answer_here(units: Sequence[Unit], settings: Evaluation) -> None:
    """Generate and judge all units, one model after the other, without Ray."""
    total = sum(len(unit.missing) for unit in units)
    with tqdm(total=total, desc="evaluate", unit="item") as bar:
        for group in by_model(units).values():
            adapters = adapters_of(group)
            ranks = [adapter_rank(folder) for folder in adapters]
            with LocalEngine(group[0].wanted.candidate.model, settings, ranks) as engine:
                for batch in batches(group, settings.batch_items):
                    adapter = adapters.get(batch.unit.wanted.candidate.adapter or "")
                    generations = engine.generate(batch.requests, adapter)
                    batch.unit.journal.add(judge_batch(batch, generations, settings.sandbox))
                    bar.update(len(batch.requests))
