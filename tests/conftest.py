"""Fixtures: one Ray cluster a session, and a small random family with the zoo's tokenizer.

The shapes in core's signatures are checked whenever the tests run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("semalign.core", "beartype.beartype")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# two test processes share two cores
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "180")

TASKS = ("mmlu", "gsm8k", "humaneval", "mbpp")


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real Ray with 2 CPUs."""
    import ray

    from semalign.engine.cluster import connect

    with connect(None, num_cpus=2):
        yield
    assert not ray.is_initialized()


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`teacher` and `student`: random Llamas of different width and depth."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from semalign.models.loading import load_tokenizer

    tokenizer = load_tokenizer("zoo/student")
    folders = {}
    for seed, (name, width, layers, heads) in enumerate(
        [("teacher", 48, 5, 3), ("student", 32, 3, 2)]
    ):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=1,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        folders[name] = tmp_path_factory.mktemp("family") / name
        LlamaForCausalLM(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders
