"""What a method fills in, what it refuses, and the rank of the adapter that comes out."""

from __future__ import annotations

import pytest

from semalign.config.jobs import Config
from semalign.config.read import resolve
from semalign.errors import UserError
from semalign.methods.method import effective, method_of
from semalign.stages.supervision import uses_heads, uses_map


def filled(*overrides: str) -> Config:
    return effective(resolve([], overrides))


def rank(*overrides: str) -> int | None:
    config = filled(*overrides)
    return method_of(config).rank(config)


def test_defaults_are_the_papers() -> None:
    training = filled().training
    assert (training.epochs, training.lr, training.batch_size) == (5, 3e-4, 64)
    assert (training.lora.rank, training.lora.alpha) == (16, 32)
    assert set(training.lora.target_modules) == {"up_proj", "down_proj", "v_proj", "o_proj"}


def test_humaneval_has_its_own_row_of_table_5() -> None:
    training = filled("data.task=humaneval").training
    assert (training.epochs, training.lr) == (3, 3e-5)


def test_an_adapter_that_vllm_would_not_serve() -> None:
    assert rank("training.lora.rank=512") == 512
    with pytest.raises(UserError, match=r"^training.lora.rank: the adapter would have rank 600; "):
        filled("training.lora.rank=600")
    with pytest.raises(UserError, match=r"^seeking.rank: the adapter would have rank 600; "):
        filled("method=seeking", "seeking.rank=300")


def test_the_rank_that_comes_out() -> None:
    assert rank("method=seeking") == 32
    assert rank("method=seeking", "seeking.modules=[up_proj, lm_head]") is None
    assert rank("method=seeking", "seeking.subtract=block") is None
    assert rank("method=laten") is None
    assert rank("training.lora.rank=4") == 4


def test_a_method_decides_the_loss() -> None:
    for method, gamma in (("sft", 0), ("sft-all", 0), ("seeking", 0), ("logit-kd", 1)):
        loss = filled(f"method={method}", "loss.beta=0.5").loss
        assert (loss.alpha, loss.beta, loss.gamma) == (0, 0.5, gamma)
    assert filled("method=logit-kd", "loss.gamma=0.2").loss.gamma == 0.2
    assert filled("loss.alpha=0.3").loss.alpha == 0.3
    with pytest.raises(UserError, match=r"^loss.alpha=0.3: has no effect with method=sft; "):
        filled("method=sft", "loss.alpha=0.3")


@pytest.mark.parametrize(
    ("overrides", "map_used", "heads_used"),
    [
        ([], True, False),
        (["loss.alpha=0"], False, False),
        (["loss.gamma=1"], True, True),
        (["loss.objective=geometry"], True, False),
        (["loss.objective=fisher"], False, True),
    ],
)
def test_what_a_loss_needs(overrides: list[str], map_used: bool, heads_used: bool) -> None:
    loss = filled(*overrides).loss
    assert (uses_map(loss), uses_heads(loss)) == (map_used, heads_used)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=seekin", "method=seekin: did you mean 'seeking'?"),
        ("loss.objective=fischer", "loss.objective=fischer: did you mean 'fisher'?"),
    ],
)
def test_unknown_names(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        filled(override)
    assert str(error.value) == message
