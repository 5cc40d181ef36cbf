"""LaTen as a method: located neurons, translated by a hypernetwork and baked into a student."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semalign.artifacts.artifact import Artifact, Cost, Json
from semalign.artifacts.host import Host
from semalign.config.jobs import Config
from semalign.config.sections import Laten
from semalign.core.pairing import Pair
from semalign.data.dataset import Dataset
from semalign.methods.controls import ALIGNMENT, EXTRACTION, without_alignment
from semalign.methods.inputs import Inputs
from semalign.methods.laten.neurons import PIECE, check_size
from semalign.methods.laten.transfer import (
    bake,
    labelled_rows,
    located_shape,
    neuron_counts,
    planned_steps,
    translate_neurons,
)
from semalign.methods.method import Method, Recipe, register_method
from semalign.models.decoder import find_decoder
from semalign.models.injection import find_modules
from semalign.models.loading import load_tokenizer
from semalign.models.memory import ADAM, WIDE, Batch, cross_entropy, loading, weights
from semalign.models.reference import Model
from semalign.models.shapes import skeleton
from semalign.models.vocabulary import Overlap
from semalign.stages.adaptation import STUDENT
from semalign.stages.measure import peak_bytes
from semalign.stages.update import HISTORY, described

_MODULES = ("up_proj", "down_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True, eq=False)
class LatenStudent(Artifact):
    """The student with translated neurons added to its weights."""

    kind = "laten"
    folder = "transfers"
    stage = "translate"

    task: str
    teacher: Model
    student: Model
    train: Dataset
    attribution: Dataset
    align: Dataset
    shared: Overlap
    laten: Laten
    seed: int

    @property
    def label(self) -> str:
        return f"{self.task}-laten"

    @property
    def models(self) -> tuple[Model, ...]:
        return self.teacher, self.student

    @property
    def steps(self) -> int:
        """How many are made. Raises UserError for more than there are attribution rows."""
        return planned_steps(self.laten, self.task, len(self.attribution))

    def identity(self) -> Json:
        rows = self.train, self.attribution, self.align
        settings = self.laten.model_dump(mode="json", exclude={"align_split"})
        cycle = self.laten.cycle or len(self.attribution)
        return {
            "models": [self.teacher.identity, self.student.identity],
            "tokens": self.student.tokens,
            "shared": self.shared.key,
            "rows": [dataset.key for dataset in rows],
            **settings,
            "steps": self.steps,
            "cycle": cycle,
            "seed": self.seed,
        }

    def cost(self) -> Cost:
        """Both models together, the hypernetwork with its optimiser, and the deltas of one example
        with their gradients; nothing of a delta's full size. Leaves a float32 student.
        """
        teacher, student, align = self.teacher.shape, self.student.shape, self.align
        steps = self.steps
        rows = steps * min(self.laten.pool, 1 + len(align))
        mean = align.length / max(1, len(align))
        longest = max(align.longest, self.attribution.longest)
        numbers = teacher.weights + student.weights
        # every neuron's column is read by the LM head, once for all rows
        neurons = sum(
            2.0
            * model.layers
            * model.config.vocab_size
            * model.width
            * (model.config.intermediate_size + model.width)
            for model in (self.teacher, self.student)
        )
        return Cost(
            operations=4.0 * student.weights * rows * mean
            + 2.0 * numbers * (steps + 1) * mean
            + neurons
            + self._translations(steps),
            disk=4 * student.weights,
            memory=self._memory(longest),
        )

    def _memory(self, longest: int) -> int:
        """Peak bytes: with both models a head in float32 and the logits of some neurons while they
        are located, the hypernetwork while it is trained, or a float32 student that is written.
        """
        student, held = self.student, weights(self.teacher, self.student)
        head = max(self.teacher.shape.head, student.shape.head)
        located = 2 * WIDE * head + 4 * WIDE * PIECE
        rows = max(self.align.most_supervised(1), self.attribution.most_supervised(1))
        batch = Batch(student, 1, longest)
        trained = (
            ADAM * self.trained_parameters
            + 2 * self.delta_bytes()
            + student.layers * batch.kept()
            + batch.forward
            + cross_entropy(student, rows)
        )
        baked = loading(student, dtype="float32")
        return held + max(located, trained, baked + self.delta_bytes())

    def _translations(self, steps: int) -> float:
        """Operations of the hypernetwork: a step takes it twice forward and once backward, to its
        parameters alone; what is baked is translated once more.
        """
        theirs, ours = self.teacher.width, self.student.width
        forward = 2.0 * theirs * (theirs + ours)
        step = 3 * forward + 2.0 * theirs * ours
        return self.moved_vectors * (steps * step + forward)

    @property
    def trained_parameters(self) -> int:
        """A two-layer MLP for each of up, down, v, o: 188,743,680 from 13B to 7B."""
        theirs, ours = self.teacher.width, self.student.width
        return 4 * (theirs * theirs + theirs * ours)

    @property
    def moved_vectors(self) -> int:
        """How many vectors are translated for one example: 96,576 at 7B."""
        config = self.student.config
        counts = neuron_counts(self.laten.share, config.intermediate_size, config.hidden_size)
        return 2 * (self.laten.layers or self.student.layers) * sum(counts.values())

    def delta_bytes(self, *, dense: bool = False) -> int:
        """The deltas in float32: a vector of the student's width for each moved neuron's two
        matrices; `dense`: as matrices of the size of those that they are added to.
        """
        if not dense:
            return 4 * self.moved_vectors * self.student.width
        model = skeleton(self.student.config)
        paths = find_modules(model, _MODULES, layers=self.laten.layers).values()
        return 4 * sum(model.get_submodule(path).weight.numel() for path in paths)  # type: ignore[operator, union-attr]

    def make(self, folder: Path, host: Host) -> Mapping[str, Json]:
        begin = time.monotonic()
        teacher, student = host.models(self.teacher, self.student)
        trust = self.student.trust_remote_code
        tokenizer = load_tokenizer(self.student.path, trust_remote_code=trust)
        special = set(tokenizer.all_special_ids)
        made = translate_neurons(
            teacher,
            student,
            train=self.train,
            attribution=self.attribution,
            align=self.align,
            student_to_teacher=self.shared.student_to_teacher,
            decode=lambda token: "" if token in special else tokenizer.decode([token]),
            task=self.task,
            settings=self.laten,
            seed=self.seed,
        )
        bake(self.student.path, made.deltas, folder / STUDENT, trust_remote_code=trust)
        names = ("loss", "cross_entropy", "penalty", "lr")
        series = {name: [getattr(step, name) for step in made.steps] for name in names}
        (folder / HISTORY).write_text(json.dumps(series), encoding="utf-8")
        measured = {
            "steps": len(made.steps),
            "located_by": made.located_by,
            "trained_parameters": made.parameters,
            "seconds": time.monotonic() - begin,
            "peak_bytes": peak_bytes(host.device),
        }
        return described(folder, measured)

    def notes(self, manifest: Mapping[str, Any]) -> list[str]:
        pool = min(self.laten.pool, 1 + len(self.align))
        return [
            f"{manifest['steps']} steps of {pool} examples",
            f"{manifest['trained_parameters']:,} parameters",
            f"sha256 {manifest['sha256'][:16]}",
        ]


class LatenMethod(Method):
    """LaTen (Tan et al., 2025): neurons located in both models, translated by a hypernetwork."""

    def effective(self, config: Config) -> Config:
        return without_alignment(config)

    def unused(self, config: Config) -> Mapping[str, str]:
        names = ("seeking", "training", "loss", *ALIGNMENT, *EXTRACTION, "pairing", "attribution")
        return dict.fromkeys(names, f"method={config.method}")

    def align_split(self, config: Config) -> str | None:
        return config.laten.align_split

    def trained_splits(self, config: Config) -> tuple[str, ...]:
        data = config.data
        return data.train_split, data.attribution_split, config.laten.align_split

    def rank(self, config: Config) -> int | None:
        return None

    def dtype(self, config: Config) -> str:
        """float32: the deltas are so small that nothing else keeps them."""
        return "float32"

    def check(self, config: Config, inputs: Inputs) -> None:
        shape = located_shape(inputs.student.config, config.laten)
        for who, model in (("student", inputs.student), ("teacher", inputs.teacher)):
            found = skeleton(model.config)
            find_modules(found, _MODULES, setting="method=laten")
            check_size(find_decoder(found), *shape, who)

    def recipe(self, config: Config, inputs: Inputs, pairs: tuple[Pair, ...]) -> Recipe:
        train, align = labelled_rows(config, inputs.train, inputs.align)
        student = LatenStudent(
            task=config.data.task,
            teacher=inputs.teacher,
            student=inputs.student,
            train=Dataset(train),
            attribution=inputs.attribution,
            align=Dataset(align),
            shared=inputs.shared,
            laten=config.laten,
            seed=config.seed,
        )
        student.steps  # noqa: B018 -- refuses more steps than rows before anything is done
        return Recipe(pairs=(), artifacts=(student,))


register_method("laten", LatenMethod())
