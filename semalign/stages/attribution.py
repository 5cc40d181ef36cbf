"""Which teacher layers carry the task: Layer Gradient x Activation of the supervised loss (4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from semalign.artifacts.artifact import Artifact, Cost, Json
from semalign.artifacts.host import Host
from semalign.config.sections import Attribution
from semalign.core.attribution import layer_scores
from semalign.data.batches import length_buckets, pad, position_mask
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens
from semalign.files import read_json, write_json
from semalign.models.decoder import find_decoder, logits, sublayer
from semalign.models.memory import Batch, cross_entropy, loading, weights
from semalign.models.reference import Model

_FILE = "scores.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerScores(Artifact):
    """One score a layer of the teacher, from the attribution rows in its own ids."""

    kind = "attribution"
    folder = "attributions"
    stage = "attribute"

    model: Model
    rows: Dataset
    settings: Attribution

    def identity(self) -> Json:
        return {
            "model": self.model.identity,
            "rows": self.rows.key,
            "granularity": self.settings.granularity,
            "aggregation": self.settings.aggregation,
        }

    @property
    def models(self) -> tuple[Model, ...]:
        return (self.model,)

    def cost(self) -> Cost:
        """A forward pass and a backward pass to the activations over all rows."""
        model, rows = self.model, min(self.settings.batch_size, len(self.rows))
        batch = Batch(model, rows, self.rows.longest)
        loss = cross_entropy(model, self.rows.most_supervised(rows))
        return Cost(
            operations=4.0 * model.shape.weights * self.rows.length,
            memory=max(
                loading(model), weights(model) + model.layers * batch.kept() + batch.forward + loss
            ),
        )

    def make(self, folder: Path, host: Host) -> Mapping[str, Json]:
        [model] = host.models(self.model)
        scores = attribution_scores(
            model,
            self.rows,
            granularity=self.settings.granularity,
            aggregation=self.settings.aggregation,
            batch_size=self.settings.batch_size,
        )
        write_json(folder / _FILE, {"layer_numbers": "from 0", "scores": scores})
        return {}

    def notes(self, manifest: Mapping[str, Any]) -> list[str]:
        settings = self.settings
        return [f"{len(self.rows)} examples, {settings.granularity}, {settings.aggregation}"]

    @staticmethod
    def read(folder: Path) -> list[float]:
        """One score a layer, the shallowest first."""
        return list(read_json(folder / _FILE)["scores"])


def attribution_scores(
    model: nn.Module,
    tokens: Sequence[Tokens],
    *,
    granularity: str,
    aggregation: str,
    batch_size: int,
) -> list[float]:
    """One score a layer, summed over the examples; index 0 is the shallowest layer.

    The loss of an example is its mean cross-entropy over the answer tokens. Cost: one forward and
    one backward pass an example for all layers together; memory: the activations of `batch_size`
    examples. Parameters get no gradients.
    """
    decoder = find_decoder(model)
    layers = [sublayer(layer, granularity) for layer in decoder.layers]
    device = next(model.parameters()).device
    longest = max(len(example.ids) for example in tokens)
    totals = [0.0] * len(layers)

    def loss(inputs_embeds: Tensor, mask: Tensor, labels: Tensor, where: Tensor) -> Tensor:
        output = decoder.base(inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False)
        chosen = logits(decoder, output.last_hidden_state[where])
        losses = nn.functional.cross_entropy(chosen.float(), labels[where], reduction="none")
        counts = where.sum(dim=1)[where.nonzero()[:, 0]].to(losses.device)
        return (losses / counts).sum()

    batches = list(length_buckets(tokens, batch_tokens=longest * batch_size))
    for batch in tqdm(batches, desc="attribute", unit="batch"):
        members = [tokens[index] for index in batch]
        ids, mask = (tensor.to(device) for tensor in pad(members, pad_id=0))
        where = position_mask(members, lambda e: e.supervised_positions, ids.shape[1]).to(device)
        embeds = decoder.embed(ids).detach()
        scores = layer_scores(
            loss, layers, embeds, args=(mask, ids.roll(-1, 1), where), aggregation=aggregation
        )
        totals = [total + score for total, score in zip(totals, scores, strict=True)]
    return totals
