"""`--plan`: needs no weights and no Ray, and refuses what this machine cannot hold."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from semalign.config.jobs import Config
from semalign.engine.cluster import check_resources
from semalign.engine.planning import show_plan, show_sweep_plan
from semalign.engine.tracking import check_uri
from semalign.errors import UserError
from semalign.sweep.file import load_sweep


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def weightless(family: dict[str, Path], tmp_path: Path) -> list[str]:
    """Models like the family's, with heads that vLLM serves; of their weights there is the header
    alone, and a hole for the numbers.
    """
    overrides = []
    for role, folder in family.items():
        copy = shutil.copytree(folder, tmp_path / role)
        LlamaForCausalLM(LlamaConfig.from_pretrained(copy, head_dim=32)).save_pretrained(copy)
        weights = copy / "model.safetensors"
        size, content = weights.stat().st_size, weights.read_bytes()
        weights.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
        os.truncate(weights, size)
        overrides.append(f"{role}={copy}")
    return overrides


def test_a_plan_reads_no_weights(
    weightless: list[str], configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(*weightless, "pairing.strategy=explicit", "pairing.explicit=[[4, 2]]")
    show_plan(config)
    printed = capsys.readouterr().out
    assert "pair: teacher 4 -> student 2 (counted from 1)" in printed
    assert "vocabulary overlap 100.00%" in printed
    for stage in ("extract", "prefix", "bases", "align", "train", "evaluate", "total"):
        assert stage in printed
    assert "attribute" not in printed
    assert not config.work.exists()


def test_what_attribution_decides_is_not_known(
    weightless: list[str], configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    show_plan(configure(*weightless))
    printed = capsys.readouterr().out
    assert "pairs: decided by attribution" in printed and "attribute" in printed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("extraction.num_gpus=64", "extraction.num_actors=1: needs 64 GPUs, the cluster has"),
        ("training.num_workers=4096", "training.num_workers=4096: needs 4096 CPUs"),
        ("evaluation.kv_cache_gb=1000000", "evaluate: needs about 1.07e+03 TB of memory"),
    ],
)
def test_too_much_is_refused(
    weightless: list[str], configure: Callable[..., Config], override: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        show_plan(configure(*weightless, override))
    assert str(error.value).startswith(message)


def test_every_stage_of_a_sweep_is_checked_and_the_cluster_joined_once(
    weightless: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest actor is on a GPU, whose memory nobody knows; another one does not fit."""
    given, memory = [], 1e12

    def available(config: Config) -> dict[str, float]:
        given.append(config)
        return {"CPU": 4.0, "GPU": 4.0, "memory": memory}

    monkeypatch.setattr("semalign.engine.planning._available", available)
    file = tmp_path / "try.yaml"
    file.write_text("axes: {loss.alpha: [0.1, 1]}\nseeds: [0, 1]\n")
    small = ["data.train_limit=20", "evaluation.tasks=[mmlu]", "evaluation.num_gpus=1"]
    sweep = load_sweep(file, [*weightless, *small, "evaluation.kv_cache_gb=1000000"])
    show_sweep_plan(sweep)
    assert len(given) == 1
    memory = 1e8
    with pytest.raises(UserError, match=r"attribute: needs about .* memory, the cluster has 100 M"):
        show_sweep_plan(sweep)


def test_an_autoscaling_cluster_may_wait(configure: Callable[..., Config]) -> None:
    nothing = {"CPU": 0.0, "GPU": 0.0, "memory": 0.0}
    check_resources(configure("cluster.autoscaling=true", "extraction.num_gpus=8"), nothing)
    with pytest.raises(UserError, match=r"cluster\.autoscaling=true waits"):
        check_resources(configure("extraction.num_gpus=8"), nothing)


@pytest.mark.parametrize("uri", ["sqlite:////tmp/a.db", "file:///tmp/runs", "http://host:5000"])
def test_absolute_tracking_uris(uri: str) -> None:
    check_uri(uri)


@pytest.mark.parametrize("uri", ["sqlite:///a.db", "mlruns", "ftp://host/x"])
def test_relative_tracking_uris_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"tracking\.uri="):
        check_uri(uri)
