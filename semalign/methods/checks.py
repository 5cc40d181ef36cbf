"""What both baselines ask of a model before they look into its weights."""

from __future__ import annotations

from semalign.errors import UserError
from semalign.models.decoder import Decoder, verify_structure


def check_model(decoder: Decoder) -> None:
    """Raise UserError for a model that is partly offloaded (its weights are not there between two
    passes), and for one whose layers or logits are not those of `verify_structure`.
    """
    if any(parameter.is_meta for parameter in decoder.model.parameters()):
        raise UserError(
            "extraction.device_map: part of the model is offloaded; expected enough GPU memory for "
            "all its weights"
        )
    verify_structure(decoder)
