"""A model by reference: where it is, how it is loaded, what it holds; no weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semalign.models import published
from semalign.models.fingerprints import (
    cached_fingerprint,
    model_fingerprint,
    serving_fingerprint,
    tokenizer_fingerprint,
)
from semalign.models.loading import has_weights, load_config, model_folder
from semalign.models.shapes import Shape, shape_of
from semalign.models.tokenizer import check_tokenizer
from semalign.models.weights import check_weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A model folder or hub id, how to load it, and the hashes of its content.

    `config` is the Hugging Face configuration of its text model. `weights` hashes configuration
    and weights, `tokens` the tokenizer, `serving` the chat template and the stop ids.
    """

    path: str
    dtype: str
    trust_remote_code: bool = False
    config: Any
    weights: str
    tokens: str
    serving: str

    @classmethod
    def open(
        cls,
        path: str,
        *,
        dtype: str,
        trust_remote_code: bool = False,
        cache: Path | None = None,
        planned: bool = False,
    ) -> Model:
        """Read configuration and hashes. Hashes are kept in the folder `cache`.

        `planned`: no weights are read, and nothing is written; where the cache has no hash of them
        the path stands in for it. Of the paper's models the published shape stands in where they
        are absent.

        **Raises** `UserError` for a model that is missing or cannot be read, and for weights or a
        tokenizer that are not what their files describe (`check_weights`, `check_tokenizer`).
        """
        if planned and published.absent(path):
            return cls(
                path=path,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                config=published.published_config(path),
                weights=path,
                tokens=path,
                serving=path,
            )
        trust = trust_remote_code
        config = load_config(path, trust_remote_code=trust).get_text_config()
        folder = model_folder(path, weights=not planned)
        if not planned or has_weights(path):
            check_weights(folder, trust_remote_code=trust)
        if planned:
            weights, cache = cached_fingerprint(path, cache=cache) or f"unread {path}", None
        else:
            weights = model_fingerprint(path, cache=cache)
        tokens = tokenizer_fingerprint(folder, cache=cache)
        check_tokenizer(path, config, tokens, trust_remote_code=trust)
        return cls(
            path=path,
            dtype=dtype,
            trust_remote_code=trust,
            config=config,
            weights=weights,
            tokens=tokens,
            serving=serving_fingerprint(folder, cache=cache),
        )

    @property
    def absent(self) -> bool:
        """Whether a published shape stands in for it."""
        return self.weights == self.path

    @property
    def identity(self) -> dict[str, str]:
        """What determines the hidden states of given token ids."""
        found = {"weights": self.weights, "dtype": self.dtype}
        return {**found, "code": "the checkpoint's"} if self.runs_own_code else found

    @functools.cached_property
    def runs_own_code(self) -> bool:
        """Whether code of the checkpoint may run, in place of that of transformers."""
        if not self.trust_remote_code or self.absent:
            return False
        return any(model_folder(self.path, weights=False).glob("*.py"))

    @functools.cached_property
    def shape(self) -> Shape:
        return shape_of(self.config)

    @functools.cached_property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @functools.cached_property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @property
    def bytes(self) -> int:
        """Of all weights in the dtype."""
        return self.shape.weights * self.shape.bytes(self.dtype)
