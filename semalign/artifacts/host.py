"""A process that makes artifacts: its device, the models that it holds, the work folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semalign.artifacts.artifact import Workspace
from semalign.models.decoder import find_decoder, verify_structure
from semalign.models.loading import load_model
from semalign.models.reference import Model

# Takes what an epoch measured, and a function that writes what is trained so far into a folder;
# returns a score, or None.
Observer = Callable[[Any, Callable[[Path], None]], float | None]


class Host:
    """Keeps models between the artifacts that are made from them, so that each is loaded once.

    `device_map="auto"` spreads a model over all devices; otherwise it is put on `device`.
    `observe` is called after every epoch of a training.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        device: str = "cpu",
        device_map: str | None = None,
        observe: Observer | None = None,
    ) -> None:
        self.workspace, self.device_map, self.observe = workspace, device_map, observe
        self.device = torch.device(device)
        self._held: dict[tuple[str, str], tuple[int, nn.Module]] = {}

    def models(self, *wanted: Model, layers: int | None = None) -> list[nn.Module]:
        """The models, frozen; those held before that are not among them are let go.

        With `layers` at least the first so many layers; one that is held whole serves too. A model
        that is loaded whole is checked (`verify_structure`). **Raises** `UserError` as
        `load_model` and `verify_structure` do.
        """
        keys = {(model.path, model.dtype) for model in wanted}
        self._held = {key: held for key, held in self._held.items() if key in keys}
        return [self._model(model, layers or model.layers) for model in wanted]

    def forget(self) -> None:
        """Let all models go."""
        self._held = {}

    def _model(self, model: Model, layers: int) -> nn.Module:
        key = model.path, model.dtype
        depth, held = self._held.get(key, (0, None))
        if held is None or depth < layers:
            self._held.pop(key, None)
            held = load_model(
                model.path,
                dtype=model.dtype,
                device=None if self.device_map else str(self.device),
                device_map=self.device_map,
                num_layers=layers if layers < model.layers else None,
                trust_remote_code=model.trust_remote_code,
            )
            if layers == model.layers:
                verify_structure(find_decoder(held))
            self._held[key] = layers, held
        return held
