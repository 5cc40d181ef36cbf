from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from semalign.errors import UserError
from semalign.models.heads import read_lm_head
from semalign.models.loading import load_model
from tests.models.architectures import FAMILIES, make_config, make_model, save_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_alone_is_the_models_head(family: str, tmp_path: Path) -> None:
    folder = str(save_checkpoint(tmp_path, family))
    assert torch.equal(read_lm_head(folder), load_model(folder).lm_head.weight)


def test_the_head_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(read_lm_head(str(tmp_path)), model.lm_head.weight)


def test_a_checkpoint_without_head_or_weights_is_refused(tmp_path: Path) -> None:
    transformers.LlamaModel(make_config("llama")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no LM head in its weights"):
        read_lm_head(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        read_lm_head(str(tmp_path))
