"""The steps of a transfer on a Ray cluster: attribute, pair, extract, align, train.

Every step leaves a file named by what determines it and skips its work when that file is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock

from semalign.artifacts.activations import ActivationStore, Column, Identity
from semalign.artifacts.files import content_key, write_json
from semalign.config.jobs import Config
from semalign.core.attribution import critical_layers
from semalign.core.pairing import Pair, pair_layers, paper_number
from semalign.data.tokens import Tokens, fingerprint
from semalign.engine import remote
from semalign.engine.extraction import ActorShape, extract
from semalign.engine.tracking import Run
from semalign.engine.training import Score, WorkerShape, fit
from semalign.models.fingerprints import model_fingerprint, tokenizer_fingerprint
from semalign.stages.inputs import Inputs
from semalign.stages.job import Hyperparameters, ModelSpec, TrainJob
from semalign.stages.supervision import teacher_columns


@dataclass(frozen=True, kw_only=True)
class Need:
    """Columns of one store, and what they are computed from."""

    stage: str
    model: ModelSpec
    tokens: list[Tokens]
    columns: frozenset[Column]
    identity: Identity


@dataclass
class Steps:
    """A transfer under way: its inputs, the fingerprints that name its files, what it made."""

    config: Config
    inputs: Inputs
    quiet: bool = False  # say only what is really done
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        trust = config.trust_remote_code
        self.teacher = ModelSpec(path=config.teacher, dtype=config.dtype, trust_remote_code=trust)
        self.student = ModelSpec(path=config.student, dtype=config.dtype, trust_remote_code=trust)
        self.prints = {
            name: (model_fingerprint(path), tokenizer_fingerprint(path))
            for name, path in (("teacher", config.teacher), ("student", config.student))
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Time a stage and print its one line; what is appended to the list goes on the line."""
        notes: list[str] = []
        start = time.monotonic()
        yield notes
        self.seconds[name] = time.monotonic() - start
        if self.quiet and (name == "pair" or any("already there" in note for note in notes)):
            return
        print(f"[{name}] {self.seconds[name]:.1f} s  {'; '.join(notes)}", flush=True)

    @property
    def gpu_shape(self) -> dict[str, float]:
        extraction = self.config.extraction
        return {"num_cpus": extraction.num_cpus, "num_gpus": extraction.num_gpus}

    def attribute(self) -> list[float]:
        """One score a teacher layer (section 4.1), from the attribution split."""
        settings = self.config.attribution
        how = {"granularity": settings.granularity, "aggregation": settings.aggregation}
        tokens = self.inputs.attribution_teacher
        key = content_key(
            "attribution", self.prints["teacher"], fingerprint(tokens), how, self.config.dtype
        )
        file = self.config.work / "attributions" / f"{key}.json"
        with self.stage("attribute") as notes:
            if file.exists():
                notes.append("already there")
            else:
                scores = ray.get(
                    remote.attribute.options(**self.gpu_shape).remote(
                        self.teacher,
                        self.config.extraction.device_map,
                        tokens,
                        batch_size=settings.batch_size,
                        **how,
                    )
                )
                write_json(file, {**how, "layer_numbers": "from 0", "scores": scores})
            notes.append(f"{len(tokens)} examples, {settings.granularity}, {settings.aggregation}")
        return list(json.loads(file.read_text(encoding="utf-8"))["scores"])

    def similarity(self) -> list[list[float]]:
        """CKA of each teacher layer with each student layer (5.3), from the attribution split."""
        tokens = (self.inputs.attribution_teacher, self.inputs.attribution)
        prints = [fingerprint(examples) for examples in tokens]
        batch_size = self.config.attribution.batch_size
        key = content_key("similarity", self.prints, prints, batch_size, self.config.dtype)
        file = self.config.work / "similarities" / f"{key}.json"
        with self.stage("similarity") as notes:
            if file.exists():
                notes.append("already there")
            else:
                matrix = ray.get(
                    remote.similarity.options(**self.gpu_shape).remote(
                        (self.teacher, self.student),
                        self.config.extraction.device_map,
                        tokens,
                        batch_size=batch_size,
                    )
                )
                numbers = "from 0; a row a teacher layer, a column a student layer"
                write_json(file, {"layer_numbers": numbers, "cka": matrix})
            notes.append(f"CKA of all layers, {len(tokens[0])} examples")
        return list(json.loads(file.read_text(encoding="utf-8"))["cka"])

    def pair(self, scores: Sequence[float]) -> tuple[Pair, ...]:
        """The pairs to train (section 4.1)."""
        pairing = self.config.pairing
        similarity = self.similarity() if pairing.strategy == "cka" else None
        with self.stage("pair") as notes:
            pairs = pair_layers(
                pairing.strategy,
                num_teacher_layers=self.inputs.teacher.num_hidden_layers,
                num_student_layers=self.inputs.student.num_hidden_layers,
                critical=critical_layers(list(scores), self.config.attribution.top_n),
                seed=self.config.seed,
                explicit=list(pairing.explicit) if pairing.explicit else None,
                similarity=similarity,
            )
            notes.append(pairing.strategy)
            notes += [str(pair) for pair in pairs]
        return tuple(pairs)

    def extract(self, pairs: Sequence[Pair]) -> tuple[ActivationStore | None, ActivationStore]:
        """What the teacher said (None: the loss needs nothing of it), and the student's input to
        its first trained layer.
        """
        said, prefix = self.needs(pairs)
        return self.fill(said) if said.columns else None, self.fill(prefix)

    def needs(self, pairs: Sequence[Pair]) -> tuple[Need, Need]:
        """What `extract` fills: the teacher's store, maybe with no column, and the student's."""
        config, inputs = self.config, self.inputs
        wanted = teacher_columns(
            pairs,
            config.loss,
            config.interfaces,
            num_layers=inputs.teacher.num_hidden_layers,
            extra_layers=inputs.extra_layers,
        )
        said = Need(
            stage="extract",
            model=self.teacher,
            tokens=inputs.train_teacher,
            columns=frozenset(wanted),
            identity=self.identity(
                "teacher",
                inputs.train_teacher,
                config.extraction.positions,
                config.extraction.dtype,
                inputs.teacher.hidden_size,
            ),
        )
        first = min(pair.student for pair in pairs)
        prefix = Need(
            stage="prefix",
            model=self.student,
            tokens=inputs.train,
            columns=frozenset([Column(first, "input")]),
            identity=self.identity(
                "student", inputs.train, "all", config.dtype, inputs.student.hidden_size
            ),
        )
        return said, prefix

    def fill(self, need: Need) -> ActivationStore:
        """The store of that identity, with the columns in it that are needed."""
        columns = sorted(need.columns)
        with self.stage(need.stage) as notes:
            store = ActivationStore(self.store_path(need), need.identity)
            made = extract(need.model, need.tokens, store, columns, self._actor_shape())
            layers = ", ".join(f"{c.interface} {paper_number(c.layer)}" for c in made)
            notes.append(
                f"layers computed (counted from 1): {layers}" if made else "already there, skipped"
            )
            notes.append(f"{store.bytes(columns) / 1e6:.1f} MB in {store.path}")
        return store

    def store_path(self, need: Need) -> Path:
        """The folder of a store: by its content, or where the configuration says."""
        given = self.config.extraction.store
        if need.stage == "extract" and given is not None:
            return Path(given).expanduser().resolve()
        return self.config.work / "stores" / need.identity.key

    def align(self) -> Path | None:
        """The map from the teacher's space to the student's (Eq. 1-2), as a file; None where the
        loss needs none.
        """
        if not self.config.loss.uses_map:
            return None
        alignment = self.config.alignment
        how = {"map": alignment.map, "top_k": alignment.top_k}
        key = content_key("transport", self.prints, how)
        file = self.config.work / "transports" / f"{key}.safetensors"
        with self.stage("align") as notes:
            shared = len(self.inputs.overlap.student_ids)
            if file.exists():
                notes.append("already there")
            else:
                ids = (self.inputs.overlap.student_ids, self.inputs.overlap.teacher_ids)
                ray.get(
                    remote.build_transport.options(**self.gpu_shape).remote(
                        self.student, self.teacher, ids, str(file), **how
                    )
                )
            notes.append(f"{alignment.map} map over {shared} shared tokens")
            notes.append(f"vocabulary overlap {self.inputs.overlap.fraction:.2%} of the student's")
        return file

    def job(
        self,
        pairs: tuple[Pair, ...],
        stores: tuple[ActivationStore | None, ActivationStore],
        transport: Path | None,
    ) -> TrainJob:
        """The update of the paired layers, as a worker is told it."""
        said, prefix = stores
        return TrainJob(
            **self._common(),
            pairs=pairs,
            transport=str(transport) if transport else None,
            teacher_store=(str(said.path), said.identity) if said else None,
            prefix_store=(str(prefix.path), prefix.identity),
            teacher=self.teacher if self.config.loss.uses_teacher_head else None,
        )

    def whole_job(self, factors: Path | None) -> TrainJob:
        """The update of every layer, from Seeking's factors if they are given: nothing is stored
        beforehand.
        """
        return TrainJob(
            **self._common(),
            pairs=(),
            transport=None,
            teacher_store=None,
            prefix_store=None,
            layers=tuple(range(self.inputs.student.num_hidden_layers)),
            factors=str(factors) if factors else None,
            seeking=self.config.seeking if factors else None,
            prints=(*self.prints["student"], fingerprint(self.inputs.train), self.config.dtype),
        )

    def _common(self) -> dict[str, Any]:
        training, limit = self.config.training, self.config.data.labelled_limit
        return {
            "student": self.student,
            "interfaces": self.config.interfaces,
            "adapter": training.adapter,
            "lora": training.lora,
            "settings": self._hyperparameters(),
            "labelled": limit if limit and limit < len(self.inputs.train) else None,
        }

    def train(self, job: TrainJob, run: Run | None, score: Score | None = None) -> Path:
        """The folder of the finished transfer, with its adapter (or its whole student).

        ``score``: of an adapter's folder after every epoch, reported to Ray Tune.
        """
        config, training = self.config, self.config.training
        folder = config.work / "transfers" / job.key
        shape = WorkerShape(
            num_workers=training.num_workers,
            cpus_per_worker=training.cpus_per_worker,
            use_gpu=training.use_gpu,
            max_failures=training.max_failures,
        )
        with self.stage("train") as notes, self.alone(job.key):
            if (folder / "manifest.json").exists():
                notes.append("already there")
            else:
                checkpoint = fit(
                    job,
                    self.inputs.train,
                    shape,
                    folder=config.work / "training",
                    name=job.key,
                    run=run,
                    score=score,
                )
                remote.publish(job, checkpoint, folder, config)
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            notes.append(f"{config.epochs} epochs, {training.num_workers} worker(s)")
            notes.append(f"{manifest['trained_parameters']:,} parameters")
            notes.append(f"sha256 {manifest['sha256'][:16]}")
        return folder

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Wait for whoever makes the same: trials of a sweep may differ in name alone."""
        file = self.config.work / "training" / f"{key}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file):
            yield

    def _hyperparameters(self) -> Hyperparameters:
        config, training = self.config, self.config.training
        return Hyperparameters(
            epochs=config.epochs,
            lr=config.lr,
            batch_size=training.batch_size,
            micro_batch_size=training.micro_batch_size,
            **config.loss.model_dump(),
            weight_decay=training.weight_decay,
            warmup_ratio=training.warmup_ratio,
            max_grad_norm=training.max_grad_norm,
            positions=config.extraction.positions,
            seed=config.seed,
        )

    def identity(
        self, model: str, tokens: list[Tokens], positions: str, dtype: str, width: int
    ) -> Identity:
        return Identity(
            model=self.prints[model][0],
            tokenizer=self.prints[model][1],
            dataset=fingerprint(tokens),
            examples=len(tokens),
            positions=positions,
            dtype=dtype,
            compute_dtype=self.config.dtype,
            width=width,
            shard_examples=self.config.extraction.shard_examples,
        )

    def _actor_shape(self) -> ActorShape:
        extraction = self.config.extraction
        return ActorShape(
            num_actors=extraction.num_actors,
            num_cpus=extraction.num_cpus,
            num_gpus=extraction.num_gpus,
            device_map=extraction.device_map,
            max_restarts=extraction.max_restarts,
            batch_tokens=extraction.batch_tokens,
        )
