"""What a method makes of a configuration: values filled in, settings without effect refused."""

from __future__ import annotations

import pickle

import pytest

from semalign.config.jobs import Config
from semalign.config.read import resolve, validate
from semalign.errors import UserError
from semalign.methods import METHODS, Transfer
from semalign.methods.method import effective, method_of, unused_settings, used_settings
from semalign.stages.supervision import uses_heads, uses_map


def filled(*overrides: str) -> Config:
    return effective(resolve([], overrides))


def test_what_is_left_open_is_filled_in() -> None:
    training = filled().training
    assert (training.epochs, training.lr, training.lora.alpha) == (5, 3e-4, 32)
    assert filled("training.lora.rank=4").training.lora.alpha == 8
    assert filled("training.lora.alpha=3").training.lora.alpha == 3
    given = filled("training.epochs=2", "training.lr=1e-3").training
    assert (given.epochs, given.lr) == (2, 1e-3)


def test_humaneval_has_its_own_row_of_table_5() -> None:
    training = filled("data.task=humaneval").training
    assert (training.epochs, training.lr) == (3, 3e-5)


def test_a_method_decides_the_loss() -> None:
    for method, gamma in (("sft", 0), ("sft-all", 0), ("seeking", 0), ("logit-kd", 1)):
        loss = filled(f"method={method}", "loss.beta=0.5").loss
        assert (loss.alpha, loss.beta, loss.gamma) == (0, 0.5, gamma)
    assert filled("method=logit-kd", "loss.gamma=0.2").loss.gamma == 0.2
    loss = filled("loss.alpha=0.3", "loss.beta=0.5").loss
    assert (loss.alpha, loss.beta, loss.gamma) == (0.3, 0.5, 0)
    with pytest.raises(UserError, match=r"^loss.gamma=0: method=logit-kd needs a weight above 0"):
        filled("method=logit-kd", "loss.gamma=0")


def test_all_weights_zero() -> None:
    nothing = "alpha, beta and gamma are all 0: there is nothing to learn"
    with pytest.raises(UserError, match=nothing):
        filled("loss.alpha=0", "loss.beta=0")
    with pytest.raises(UserError, match=nothing):
        filled("method=sft", "loss.beta=0")
    filled("loss.alpha=0", "loss.beta=0", "loss.gamma=0.5")
    filled("method=logit-kd", "loss.beta=0")


@pytest.mark.parametrize(
    ("overrides", "with_map", "with_heads"),
    [
        ([], True, False),
        (["loss.alpha=0"], False, False),
        (["loss.gamma=1"], True, True),
        (["loss.objective=geometry"], True, False),
        (["loss.objective=fisher"], False, True),
        (["method=sft"], False, False),
        (["method=logit-kd"], False, True),
    ],
)
def test_what_a_loss_needs(overrides: list[str], with_map: bool, with_heads: bool) -> None:
    loss = filled(*overrides).loss
    assert (uses_map(loss), uses_heads(loss)) == (with_map, with_heads)


def test_the_rank_that_comes_out() -> None:
    def rank(*overrides: str) -> int | None:
        config = filled(*overrides)
        return method_of(config).rank(config)

    assert rank("method=seeking") == 32
    assert rank("method=seeking", "seeking.modules=[up_proj, lm_head]") is None
    assert rank("method=seeking", "seeking.subtract=block") is None
    assert rank("method=laten") is None
    assert rank("training.lora.rank=4") == 4
    assert rank("training.adapter=full") is None


def test_an_adapter_that_vllm_would_not_serve() -> None:
    config = filled("training.lora.rank=512")
    assert method_of(config).rank(config) == 512
    with pytest.raises(UserError, match=r"^training.lora.rank: the adapter would have rank 600; "):
        filled("training.lora.rank=600")
    with pytest.raises(UserError, match=r"^seeking.rank: the adapter would have rank 600; "):
        filled("method=seeking", "seeking.rank=300")


WITHOUT_EFFECT = [
    (["method=sft", "loss.alpha=0.5"], "loss.alpha=0.5", "method=sft"),
    (["method=sft", "loss.gamma=0.5"], "loss.gamma=0.5", "method=sft"),
    (["method=logit-kd", "loss.alpha=0.5"], "loss.alpha=0.5", "method=logit-kd"),
    (["method=sft", "extraction.interface=attn"], "extraction.interface=attn", "method=sft"),
    (["method=sft-all", "pairing.strategy=last"], "pairing.strategy=last", "method=sft-all"),
    (["method=seeking", "training.adapter=full"], "training.adapter=full", "method=seeking"),
    (["method=seeking", "training.lora.rank=4"], "training.lora.rank=4", "method=seeking"),
    (["method=seeking", "loss.objective=fisher"], "loss.objective=fisher", "method=seeking"),
    (["method=laten", "training.lr=1e-3"], "training.lr=0.001", "method=laten"),
    (["method=laten", "loss.beta=0.5"], "loss.beta=0.5", "method=laten"),
    (["laten.steps=2"], "laten.steps=2", "method=semalign"),
    (["seeking.rank=4"], "seeking.rank=4", "method=semalign"),
    (
        ["pairing.explicit=[[1, 1]]"],
        "pairing.explicit=[[1, 1]]",
        "pairing.strategy=proportional",
    ),
    (
        ["pairing.strategy=last", "attribution.top_n=2"],
        "attribution.top_n=2",
        "pairing.strategy=last",
    ),
    (
        ["pairing.strategy=random", "attribution.granularity=mlp"],
        "attribution.granularity=mlp",
        "pairing.strategy=random",
    ),
    (
        ["pairing.strategy=random", "data.attribution_split=dev"],
        "data.attribution_split=dev",
        "pairing.strategy=random",
    ),
    (
        ["loss.objective=fisher", "alignment.map=dual"],
        "alignment.map=dual",
        "loss.objective=fisher",
    ),
    (["loss.objective=fisher", "alignment.top_k=3"], "alignment.top_k=3", "loss.objective=fisher"),
    (
        ["training.adapter=full", "training.lora.rank=8"],
        "training.lora.rank=8",
        "training.adapter=full",
    ),
    (["loss.alpha=0", "loss.objective=geometry"], "loss.objective=geometry", "loss.alpha=0"),
    (
        ["loss.alpha=0", "extraction.positions=answer"],
        "extraction.positions=answer",
        "loss.alpha=0",
    ),
]


@pytest.mark.parametrize(("overrides", "setting", "decider"), WITHOUT_EFFECT)
def test_settings_without_effect_are_refused(
    overrides: list[str], setting: str, decider: str
) -> None:
    with pytest.raises(UserError) as error:
        filled(*overrides)
    assert str(error.value) == f"{setting}: has no effect with {decider}; leave it out"


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=sft", "loss.alpha=0"],
        ["method=sft", "loss.gamma=0", "extraction.interface=mlp"],
        ["pairing.explicit=null"],
        ["method=seeking", "training.adapter=lora", "training.lora.alpha=32"],
        ["method=seeking", "training.lora.target_modules=[up_proj, down_proj, v_proj, o_proj]"],
        ["method=laten", "training.lr=3e-4", "training.epochs=5"],
        ["method=laten", "data.task=humaneval", "training.lr=3e-5", "training.epochs=3"],
        ["loss.objective=fisher", "alignment.map=cosine"],
        ["training.adapter=full", "training.lora.rank=16", "training.lora.alpha=32"],
        ["loss.alpha=0", "loss.objective=cosine", "extraction.positions=all"],
        ["method=sft", "extraction.layers=[2]", "extraction.interface=attn"],  # stored as wished
        ["loss.alpha=0", "loss.gamma=1", "extraction.positions=answer"],
        ["method=laten", "extraction.num_actors=2", "training.num_workers=2"],  # how, not what
    ],
)
def test_what_holds_anyway_may_be_written_out(overrides: list[str]) -> None:
    filled(*overrides)


@pytest.mark.parametrize("method", [*METHODS])
@pytest.mark.parametrize(
    "overrides", [[], ["data.task=humaneval"], ["training.num_workers=2", "loss.beta=1"]]
)
def test_twice_effective_is_once(method: str, overrides: list[str]) -> None:
    once = filled(f"method={method}", *overrides)
    assert effective(once) == once
    written = validate(once.model_dump(mode="json"))  # as it is logged and saved
    assert effective(written) == once
    assert effective(pickle.loads(pickle.dumps(once))) == once
    assert used_settings(effective(written)) == used_settings(once)


def test_every_setting_is_used_or_unused_or_runtime() -> None:
    for method in METHODS:
        config = filled(f"method={method}")
        used, unused = used_settings(config), unused_settings(config)
        assert not used.keys() & unused.keys()
        assert "workdir" not in used and "extraction.num_gpus" not in used
    used = used_settings(filled())
    assert used["training.lr"] == 3e-4 and used["training.lora.alpha"] == 32
    assert used_settings(filled("method=logit-kd"))["loss.gamma"] == 1
    assert "evaluation.sampling.n" not in used
    assert used_settings(filled("evaluation.sampling.n=4"))["evaluation.sampling.n"] == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=semalgin", "method=semalgin: did you mean 'semalign'?"),
        ("loss.objective=fischer", "loss.objective=fischer: did you mean 'fisher'?"),
        ("alignment.map=cosin", "alignment.map=cosin: did you mean 'cosine'?"),
        ("pairing.strategy=revers", "pairing.strategy=revers: did you mean 'reverse'?"),
        ("data.task=mmlo", "data.task=mmlo: did you mean 'mmlu'?"),
        ("evaluation.tasks=[gsm8]", "evaluation.tasks=gsm8: did you mean 'gsm8k'?"),
        ("evaluation.protocol=papr", "protocol 'papr' is unknown; did you mean 'paper'?"),
    ],
)
def test_unknown_names_give_the_nearest(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Transfer.of(resolve([], [override, "data.train_limit=4"]))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_strength_needs_coefficients() -> None:
    with pytest.raises(UserError, match=r"^alignment.top_k: .* alignment.map=dual does not make"):
        filled("alignment.map=dual", "alignment.top_k=3")
