"""How alike the layers of two models are on the same examples: linear CKA (section 5.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from semalign.artifacts.artifact import Artifact, Cost, Json
from semalign.artifacts.host import Host
from semalign.core.similarity import MinibatchCKA
from semalign.data.batches import pad, places
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens, count_positions
from semalign.files import read_json, write_json
from semalign.models.decoder import Decoder, capture, find_decoder, run_base
from semalign.models.memory import WIDE, Batch, loading, weights
from semalign.models.reference import Model

_FILE = "cka.json"
_BATCH = 8  # examples whose positions are compared together
_ROWS = 512  # of a batch, so that all layers of both models fit in memory in float64


@dataclass(frozen=True, kw_only=True, eq=False)
class Similarity(Artifact):
    """CKA of every teacher layer with every student layer, from the same rows in both's ids."""

    kind = "similarity"
    folder = "similarities"
    stage = "similarity"

    teacher: Model
    student: Model
    teacher_rows: Dataset
    student_rows: Dataset

    def identity(self) -> Json:
        return {
            "models": [self.teacher.identity, self.student.identity],
            "rows": [self.teacher_rows.key, self.student_rows.key],
        }

    @property
    def models(self) -> tuple[Model, ...]:
        return self.teacher, self.student

    def cost(self) -> Cost:
        """A forward pass of both models over all rows."""
        models = self.teacher, self.student
        rows = min(_BATCH, len(self.teacher_rows))
        batches = [
            Batch(self.teacher, rows, self.teacher_rows.longest),
            Batch(self.student, rows, self.student_rows.longest),
        ]
        states = [model.layers * batch.states for model, batch in zip(models, batches, strict=True)]
        # of one batch, in float64: all layers of both, each no wider than it has rows
        narrow = sum(8 * m.layers * _ROWS * min(_ROWS, m.width) for m in models)
        compared = sum(WIDE * m.layers * _ROWS * m.width for m in models) + narrow
        return Cost(
            operations=2.0 * sum(m.shape.weights for m in models) * self.teacher_rows.length,
            memory=max(
                *(loading(model) for model in models),
                weights(*models) + max(*states, compared) + max(b.forward for b in batches),
            ),
        )

    def make(self, folder: Path, host: Host) -> Mapping[str, Json]:
        teacher, student = host.models(self.teacher, self.student)
        rows = self.teacher_rows, self.student_rows
        cka = layer_similarity(teacher, student, *rows, batch_size=_BATCH)
        numbers = "from 0; a row a teacher layer, a column a student layer"
        write_json(folder / _FILE, {"layer_numbers": numbers, "cka": cka})
        return {}

    def notes(self, manifest: Mapping[str, Any]) -> list[str]:
        return [f"CKA of all layers, {len(self.student_rows)} examples"]

    @staticmethod
    def read(folder: Path) -> list[list[float]]:
        """A row a teacher layer, a column a student layer."""
        return list(read_json(folder / _FILE)["cka"])


@torch.inference_mode()
def layer_similarity(
    teacher: nn.Module,
    student: nn.Module,
    teacher_tokens: Sequence[Tokens],
    student_tokens: Sequence[Tokens],
    *,
    batch_size: int,
) -> list[list[float]]:
    """CKA of the block outputs: a row a teacher layer, a column a student layer, from 0.

    The same examples in either model's ids, at the positions that are aligned; batches of
    `batch_size` of them in an order that is always the same, of each batch at most 512 positions
    drawn at random.
    Cost: a forward pass of both models, and that of MinibatchCKA. Raises UserError for a batch of
    less than 4 positions.
    """
    decoders = find_decoder(teacher), find_decoder(student)
    device = next(student.parameters()).device
    cka = MinibatchCKA(*(len(decoder.layers) for decoder in decoders))
    generator = torch.Generator().manual_seed(0)
    for batch in torch.randperm(len(student_tokens), generator=generator).split(batch_size):
        count = sum(count_positions(student_tokens[e].align_positions("all")) for e in batch)
        rows = torch.randperm(count, generator=generator)[:_ROWS]
        cka.update(
            *(
                [block.to(device) for block in _blocks(decoder, [tokens[e] for e in batch], rows)]
                for decoder, tokens in zip(decoders, (teacher_tokens, student_tokens), strict=True)
            )
        )
    return cka.matrix().tolist()


def _blocks(decoder: Decoder, tokens: Sequence[Tokens], rows: Tensor) -> list[Tensor]:
    """Every layer's output at `rows` of the examples' aligned positions, counted through: (N, D)
    each.
    """
    ids, mask = pad(tokens, pad_id=0)
    wanted = [(layer, "block") for layer in range(len(decoder.layers))]
    with capture(decoder, wanted) as seen:
        run_base(decoder, ids, mask)
    chosen = places(tokens, lambda e: e.align_positions("all"), ids.shape[1])[rows]
    return [seen[key].flatten(0, 1)[chosen.to(seen[key].device)] for key in wanted]
