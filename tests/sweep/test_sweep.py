"""Sweep files: what they stand for, and the one line that a mistake gets."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from semalign.config.read import resolve
from semalign.errors import UserError
from semalign.methods.method import effective, used_settings
from semalign.sweep.axes import Range
from semalign.sweep.file import Sweep, load_sweep
from semalign.sweep.trials import count, trials

BASE = "base: {data: {task: mmlu}, training.lr: 3e-3, evaluation: {tasks: [mmlu]}}\n"

Load = Callable[..., Sweep]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def make(text: str, *overrides: str) -> Sweep:
        file = tmp_path / "try.yaml"
        file.write_text(BASE + text)
        return load_sweep(file, overrides)

    return make


def labels(sweep: Sweep) -> list[tuple[str, int]]:
    return [(trial.label, trial.seed) for trial in trials(sweep)]


def test_a_grid_with_seeds(load: Load) -> None:
    sweep = load("axes: {loss.alpha: [0.1, 1], loss.beta: [1, 2]}\nseeds: [0, 1]\n")
    assert labels(sweep) == [
        (f"loss.alpha={alpha}, loss.beta={beta}", seed)
        for alpha in ("0.1", "1")
        for beta in (1, 2)
        for seed in (0, 1)
    ]
    first = trials(sweep)[0]
    assert (first.config.loss.alpha, first.config.loss.beta, first.config.training.lr) == (
        0.1,
        1,
        3e-3,
    )
    assert first.axes == {"loss.alpha": 0.1, "loss.beta": 1.0}
    assert first.base and not trials(sweep)[2].base  # 0.1 and 1 are the defaults


def test_the_base_is_a_trial_unless_it_is_among_them(load: Load) -> None:
    assert labels(load("axes: {loss.alpha: [0.3]}\n")) == [("base", 0), ("loss.alpha=0.3", 0)]
    assert labels(load("axes: {loss.alpha: [0.1]}\n")) == [("loss.alpha=0.1", 0)]
    assert labels(load("seeds: [4, 2]\n")) == [("base", 4), ("base", 2)]


def test_equal_configurations_are_one_trial_with_the_first_label(load: Load) -> None:
    sweep = load(
        "axes:\n  loss.alpha: [0, 0.03, 0.1]\n  variant:\n    cases:\n"
        "      cross-entropy: {loss.alpha: 0}\n      dual: {loss: {beta: 2}}\n"
    )
    assert count(sweep) == 6
    assert [label for label, _ in labels(sweep)] == [
        "base",
        "loss.alpha=0, variant=cross-entropy",
        "loss.alpha=0, variant=dual",
        "loss.alpha=0.03, variant=dual",
        "loss.alpha=0.1, variant=dual",
    ]


def test_ids_are_of_what_decides_the_result(load: Load) -> None:
    text = "axes: {loss.alpha: [0.1, 1]}\nseeds: [0, 1]\n"
    found = trials(load(text))
    assert len({trial.id for trial in found}) == 4
    assert len({trial.setting for trial in found}) == 2
    moved = trials(load(text, "workdir=elsewhere", "tracking.experiment=x", "cluster.address=y"))
    assert [trial.id for trial in moved] == [trial.id for trial in found]
    assert [trial.id for trial in trials(load(text, "training.epochs=1"))] != [
        trial.id for trial in found
    ]


def test_draws_are_repeatable_and_combined_with_every_point(load: Load) -> None:
    text = (
        "axes:\n  loss.beta: {uniform: [0, 1]}\n  loss.alpha: [0.1, 1]\n"
        "  training.lr: {loguniform: [1e-5, 1e-2]}\n  attribution.top_n: {randint: [1, 3]}\n"
        "samples: 6\n"
    )
    found = [trial for trial in trials(load(text)) if trial.axes]
    assert [trial.axes for trial in found] == [t.axes for t in trials(load(text)) if t.axes]
    assert len(found) == count(load(text)) == 12
    points = [{k: v for k, v in t.axes.items() if k != "loss.alpha"} for t in found]
    assert points[:6] == points[6:]
    for point in points:
        assert 0 <= point["loss.beta"] <= 1
        assert 1e-5 <= point["training.lr"] <= 1e-2
        assert point["attribution.top_n"] in (1, 2, 3)
    fewer = [t.axes for t in trials(load(text, "sweep.samples=2")) if t.axes]
    assert fewer == [found[i].axes for i in (0, 1, 6, 7)]
    other = [t.axes for t in trials(load(text, "sweep.name=other")) if t.axes]
    assert other != [t.axes for t in found]


def test_a_logarithmic_range_spreads_over_its_decades() -> None:
    from random import Random

    axis, random = Range("training.lr", "loguniform", 1e-5, 1e-1), Random(0)
    drawn = [axis.draw(random) for _ in range(400)]
    assert 80 < sum(value < 1e-4 for value in drawn) < 120
    assert all(float(f"{value:.4g}") == value for value in drawn)


def test_pairs_imply_their_strategy_and_all_means_every_pair(
    load: Load, family: dict[str, Path]
) -> None:
    found = trials(load("axes: {pairing.explicit: [[[1, 1]], [[2, 1], [3, 2]]]}\n"))[1:]
    assert [trial.config.pairing.strategy for trial in found] == ["explicit"] * 2
    assert found[1].label == "pairing.explicit=[[2,1],[3,2]]"
    models = [f"{role}={folder}" for role, folder in family.items()]
    for everything in ("all", "{all: true}"):
        sweep = load(f"axes: {{pairing.explicit: {everything}}}\n", *models)
        pairs = [trial.config.pairing.explicit for trial in trials(sweep)[1:]]
        assert pairs == [((t, s),) for t in range(1, 6) for s in range(1, 4)]


def test_sections_and_nothing_are_values_too(load: Load) -> None:
    sweep = load(
        "axes:\n  training.lora: [{rank: 4, dropout: 0.1}, {rank: 8}]\n"
        "  data.train_limit: [32, null]\n",
        "sweep.base.training.lora.dropout=0.2",
    )
    found = trials(sweep)[1:]
    assert [(t.config.training.lora.rank, t.config.training.lora.dropout) for t in found] == [
        *[(4, 0.1)] * 2,
        *[(8, 0.2)] * 2,
    ]
    assert [t.axes["data.train_limit"] for t in found] == [32, None] * 2
    assert "data.train_limit=null" in found[1].label


def test_overrides_of_base_and_sweep(load: Load) -> None:
    text = "axes: {loss.alpha: [0.1, 1], loss.beta: [1]}\nselect: {split: dev}\n"
    sweep = load(
        text,
        "training.epochs=2",
        "sweep.seeds=[3]",
        "sweep.axes.loss.alpha=[0.5]",
        "sweep.base.loss.beta=2",
        "sweep.select.mode=min",
        "sweep.scheduler.asha.grace_epochs=2",
    )
    assert [
        (t.label, t.seed, t.config.training.epochs, t.config.loss.beta) for t in trials(sweep)
    ] == [
        ("base", 3, 2, 2.0),
        ("loss.alpha=0.5, loss.beta=1", 3, 2, 1.0),
    ]
    assert (sweep.select.mode, sweep.select.split, sweep.select.metric) == ("min", "dev", "mmlu")
    assert sweep.scheduler and sweep.scheduler.asha.grace_epochs == 2
    assert load("seeds: [1]\n", "sweep.axes.loss.alpha={uniform: [0, 1]}", "sweep.samples=2").ranges


def test_every_trial_is_a_configuration_of_its_own(load: Load, tmp_path: Path) -> None:
    trial = trials(load("axes: {loss.alpha: [1]}\n"))[1]
    by_hand = ["training.lr=3e-3", "evaluation.tasks=[mmlu]", "loss.alpha=1"]
    by_hand.append("evaluation.splits=[dev,test]")  # a transfer chooses nothing on dev
    assert trial.config == effective(resolve([], by_hand))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axis: {}", "axis: unknown key; did you mean 'axes'?"),
        (
            "axes: {loss.alpa: [1]}",
            "axes.loss.alpa: loss.alpa is no setting; did you mean 'loss.al",
        ),
        ("axes: {quux: [1]}", "axes.quux: quux is no setting; expected one of: alignment, "),
        ("axes: {loss.alpha: []}", "axes.loss.alpha: empty; expected at least one value"),
        ("axes: {loss.alpha: 3}", "axes.loss.alpha=3: expected a list of values, a range such as"),
        ("axes: [loss.alpha]", "axes=['loss.alpha']: expected a mapping of settings"),
        ("axes: {v: {cases: {}}}", "axes.v.cases: empty; expected"),
        ("axes: {v: {cases: {a: 1}}}", "axes.v.cases.a=1: expected settings such as"),
        (
            "axes: {v: {cases: {a: {los.alpha: 1}}}}",
            "axes.v.cases.a: los.alpha is no setting; did you mean 'loss.alpha'?",
        ),
        ("axes: {v: {cases: {a: {}}, b: 1}}", "axes.v.b: unknown key; expected only cases"),
        ("axes: {seed: [1]}", "axes.seed: seed cannot be an axis; the seeds are an axis of their"),
        ("axes: {dtype: [float16]}", "axes.dtype: dtype cannot be an axis; all trials are scored"),
        (
            "axes: {trust_remote_code: [true]}",
            "axes.trust_remote_code: trust_remote_code cannot be",
        ),
        (
            "axes: {v: {cases: {half: {dtype: float16}}}}",
            "axes.v.cases.half: dtype cannot be an axis",
        ),
        ("axes: {data.root: [a, b]}", "axes.data.root: trials would be scored on the rows of th"),
        ("axes: {data: [{root: a}]}", "axes.data: trials would be scored on the rows of their"),
        (
            "axes: {v: {cases: {a: {data.root: a}}}}",
            "axes.v: trials would be scored on the rows of their own data.root; set evaluation.r",
        ),
        ("axes: {'a, b': {cases: {c: {}}}}", "axes.a, b: expected a name that MLflow takes: lett"),
        ("axes: {a/: {cases: {c: {}}}}", "axes.a/: expected a name that MLflow takes"),
        ("models: 3", "models=3: expected {name: {base: settings, axes: axes}}"),
        ("models: {a: 3}", "models.a=3: expected {base: settings, axes: axes}"),
        ("models: {a: {base: 3}}", "models.a.base=3: expected a mapping of settings"),
        ("models: {a: {axes: [1]}}", "models.a.axes=[1]: expected a mapping of settings"),
        ("models: {a: {bse: {}}}", "models.a.bse: unknown key; did you mean 'base'?"),
        ("axes: {evaluation.protocol: [a]}", "axes.evaluation.protocol: evaluation.protocol cann"),
        ("axes: {loss.beta: {uniform: [0, 1]}}", "axes.loss.beta: a range needs samples, e.g. sa"),
        ("samples: 3", "samples=3: no axis is a range, there is nothing to draw"),
        ("search: optuna", "search=optuna: no axis is a range, there is nothing to search"),
        (
            "axes: {loss.beta: {unifrm: [0, 1]}}",
            "axes.loss.beta.unifrm: unknown kind of range; did",
        ),
        (
            "axes: {loss.beta: {uniform: [1, 1]}}",
            "axes.loss.beta.uniform=[1, 1]: low must be below",
        ),
        ("axes: {loss.beta: {uniform: 3}}", "axes.loss.beta.uniform=3: expected [low, high], two"),
        (
            "axes: {loss.beta: {loguniform: [0, 1]}}",
            "axes.loss.beta.loguniform=[0, 1]: a logarithm",
        ),
        ("axes: {seed.x: {randint: [0, 1.5]}}", "axes.seed.x: seed.x cannot be an axis"),
        (
            "axes: {attribution.top_n: {randint: [1, 1.5]}}",
            "axes.attribution.top_n.randint=[1, 1.5",
        ),
        ("seeds: []", "seeds=[]: Tuple should have at least 1 item"),
        (
            "select: {split: test}",
            "select.split=test: a setting is not chosen on the split that is",
        ),
        ("report: {split: dev}", "select.split=dev: a setting is not chosen on the split that is"),
        ("select: {split: dve}", "select.split=dve: not in evaluation.splits; did you mean 'dev'?"),
        (
            "report: {split: tset}",
            "report.split=tset: not in evaluation.splits; did you mean 'test'",
        ),
        (
            "select: {metric: gsm8k}",
            "select.metric=gsm8k: not in evaluation.tasks; expected one of",
        ),
        ("select: {metric: gsm}", "select.metric=gsm: not in evaluation.tasks; expected one of"),
        ("select: {spilt: dev}", "select.spilt: unknown key; did you mean 'select.split'?"),
        (
            "scheduler: {hyperband: {}}",
            "scheduler.hyperband: unknown key; expected one of: scheduler.asha",
        ),
        ("search: grid", "search='grid': expected one of: optuna, random"),
        (
            "axes: {training.num_workers: [1, 2]}",
            "axes.training.num_workers: training.num_workers cannot be an axis; it decides where a",
        ),
        (
            "axes: {extraction: [{num_actors: 2}]}",
            "axes.extraction: extraction.num_actors cannot be an axis; it decides where a run goes",
        ),
        (
            "axes: {v: {cases: {a: {attribution.batch_size: 2}}}}",
            "axes.v.cases.a: attribution.batch_size cannot be an axis; it decides where a run goes",
        ),
        ("axes: {method: [sft, smealign]}", "axes.method: method=smealign: did you mean 'semalign"),
        ("axes: {pairing.strategy: [lst]}", "axes.pairing.strategy: pairing.strategy=lst: did you"),
        (
            "axes: {v: {cases: {a: {loss.objective: fishr}}}}",
            "axes.v: loss.objective=fishr: did you mean 'fisher'?",
        ),
        ("axes: {alignment.map: [dul]}", "axes.alignment.map: alignment.map=dul: did you mean 'd"),
        ("axes: {data.task: [mmlu, gsm]}", "axes.data.task: data.task=gsm: did you mean 'gsm8k'?"),
    ],
)
def test_bad_files(load: Load, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(text + "\n")
    assert str(error.value).startswith(f"{tmp_path / 'try.yaml'}: {message}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_bad_bases(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    for text, message in (
        ("base: {los.alpha: 1}", "base: los.alpha: unknown key; did you mean 'loss.alpha'?"),
        ("base: {loss: {alpha: much}}", "base: loss.alpha='much': Input should be a valid number"),
        ("base: {seed: 3}", "base.seed: the seeds are an axis of their own"),
        ("base: 3", "base=3: expected a mapping of settings"),
        ("base: {method: sftt}", "base: method=sftt: did you mean 'sft'?"),
        ("base: {evaluation.tasks: [mlu]}", "base.evaluation.tasks: data.task=mlu: did you mean"),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as error:
            load_sweep(file)
        assert str(error.value).startswith(f"{file}: {message}")


def test_bad_overrides(load: Load) -> None:
    text = "axes: {loss.alpha: [1]}\n"
    with pytest.raises(UserError, match=r"loss\.alpha: axis 'loss\.alpha' sets it.*expected sweep"):
        load(text, "loss.alpha=0.5")
    with pytest.raises(UserError, match=r"sampels: unknown key; did you mean 'samples'\?"):
        load(text, "sweep.sampels=4")
    with pytest.raises(UserError, match="expected key=value"):
        load(text, "sweep.samples")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes: {loss.alpha: [1, -1]}", "trial loss.alpha=-1: loss.alpha=-1: Input should be"),
        (
            "axes: {loss.alpha: [0, 1], loss.beta: [0]}",
            "trial loss.alpha=0, loss.beta=0: loss: alpha, beta and gamma are all 0: ther",
        ),
        ("axes: {loss.alpha: [2020-01-01]}", 'trial loss.alpha="2020-01-01": loss.alpha=datetime'),
        (
            "axes: {v: {cases: {few: {alignment.map: dual, alignment.top_k: 3}}}}",
            "trial v=few: alignment.top_k: chooses among Eq. 1's coefficients, which alignment.map",
        ),
    ],
)
def test_a_bad_trial_is_named(load: Load, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        trials(load(text + "\n"))
    assert str(error.value).startswith(f"sweep try: {message}")


def test_runtime_settings_and_those_without_effect_make_no_other_trial(load: Load) -> None:
    text = "axes: {loss.alpha: [0.1, 1]}\nseeds: [0, 1]\n"
    ids = [trial.id for trial in trials(load(text))]
    for runtime in (
        "training.num_workers=2",
        "extraction.shard_examples=8",
        "attribution.batch_size=1",
    ):
        assert [trial.id for trial in trials(load(text, runtime))] == ids
    methods = "axes: {method: [sft, semalign]}\n"
    plain, ranked = trials(load(methods)), trials(load(methods, "loss.alpha=0.3"))
    assert [t.id == o.id for t, o in zip(plain, ranked, strict=True)] == [True, False]
    assert plain[0].config == ranked[0].config and plain[0].axes["method"] == "sft"


def test_a_setting_of_an_axis_without_effect_is_refused(load: Load) -> None:
    sweep = load("axes: {loss.alpha: [0, 0.1], alignment.map: [cosine, dual]}\n")
    with pytest.raises(UserError) as error:
        trials(sweep)
    assert str(error.value) == (
        "sweep try: trial loss.alpha=0, alignment.map=dual: alignment.map=dual: has no effect with "
        "loss.alpha=0; leave it out"
    )


def test_a_setting_of_the_base_is_used_in_some_trial(load: Load) -> None:
    used = load("axes: {loss.alpha: [0, 0.1]}\n", "alignment.map=dual")
    maps = [used_settings(trial.config).get("alignment.map") for trial in trials(used)]
    assert maps == [None, "dual"]
    for text, override, message in (
        ("axes: {loss.beta: [1, 2]}\n", ["loss.alpha=0", "alignment.map=dual"],
         "sweep try: base: alignment.map=dual: has no effect in any trial, here with loss.alpha=0"),
        ("axes: {method: [sft, sft-all]}\n", ["method=logit-kd", "seeking.rank=4"],
         "sweep try: base: seeking.rank=4: has no effect in any trial, here with method=logit-kd"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            trials(load(text, *[o for o in override if not o.startswith("method=")]))
        assert str(error.value).startswith(message.partition(", here")[0])
        assert str(error.value).endswith("; leave it out")


def test_too_many_trials_are_counted_not_made(load: Load) -> None:
    axis = list(range(1, 101))
    sweep = load(
        f"axes: {{loss.alpha: {axis}, loss.beta: {axis}, training.epochs: {axis}}}\nseeds: [0, 1]\n"
    )
    with pytest.raises(UserError, match=r"2,000,000 trials are more than 10,000; .*say --yes"):
        trials(sweep)
    small = load(f"axes: {{loss.alpha: {axis}, loss.beta: {[*axis, 101]}}}\n")
    assert count(small) == 10_100
    with pytest.raises(UserError, match="10,100 trials"):
        trials(small)
    assert len(trials(small, yes=True)) == 10_101  # and the base


COMPARED = """
axes: {data.task: [mmlu, gsm8k], method: [sft, laten]}
compare: {axis: method, control: sft}
models:
  other: {base: {student: zoo/teacher, training: {lr: null}}, axes: {data.task: [mbpp]}}
"""
BOTH = "evaluation.tasks=[mmlu,gsm8k,mbpp]"


def test_methods_side_by_side_are_scored_on_their_own_task(load: Load) -> None:
    sweep = load(COMPARED, BOTH)
    found = trials(sweep)
    assert [(t.config.data.task, t.config.method) for t in found] == [
        (task, method) for task in ("mmlu", "gsm8k") for method in ("sft", "laten")
    ]
    assert all(t.config.evaluation.tasks == (t.config.data.task,) for t in found)
    assert sweep.metric("gsm8k") == ("gsm8k", "test")


def test_models_take_the_place_of_base_and_axes(load: Load) -> None:
    found = trials(load(COMPARED, BOTH, "models=other"))
    assert {(t.config.student, t.config.training.lr, t.config.data.task) for t in found} == {
        ("zoo/teacher", 3e-4, "mbpp")
    }


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (COMPARED, "models=othr", "models=othr: did you mean 'other'"),
        ("axes: {loss.alpha: [1]}", "models=other", "the file has no sets of models"),
        (COMPARED.replace("axis: method", "axis: metod"), BOTH, "did you mean 'method'"),
        (
            COMPARED.replace("control: sft", "control: stf"),
            BOTH,
            "sweep try: compare.control=stf: no trial has it; did you mean 'sft'?",
        ),
        (COMPARED, "evaluation.splits=[dev]", "report.split=test: not in evaluation.splits"),
        (COMPARED + "scheduler: {asha: {}}", BOTH, "trained to the end"),
        (
            COMPARED.replace("axes: {", "axes: {loss.alpha: {uniform: [0, 1]}, ")
            + "search: optuna\nsamples: 3",
            BOTH,
            "search=optuna: a comparison chooses nothing, and its scores are the report split's; "
            "leave it out",
        ),
        (
            COMPARED.replace("axes: {", "axes: {loss.alpha: {uniform: [0, 1]}, "),
            BOTH,
            "axes.loss.alpha: a range needs samples",
        ),
    ],
)
def test_a_bad_comparison_is_one_line(load: Load, text: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        trials(load(text, override))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("control", ["0", "0.001", "1e-3"])
def test_a_control_is_named_as_its_label_says(load: Load, control: str) -> None:
    """Also where a file says the value otherwise: `1e-3` is a text in YAML."""
    axes = "loss.alpha: [0, 1e-3, 1]"
    text = f"axes: {{{axes}}}\ncompare: {{axis: loss.alpha, control: {control}}}\n"
    if control == "1e-3":
        with pytest.raises(UserError, match=r"compare\.control=1e-3: no trial has it; .*0\.001"):
            trials(load(text))
    else:
        assert len(trials(load(text))) == 3


def test_rows_of_several_roots_are_scored_on_one(load: Load) -> None:
    found = trials(load("axes: {data.root: [a, b]}\n", "evaluation.root=zoo/data"))
    assert [trial.config.data.root for trial in found] == ["zoo/data", "a", "b"]


def test_a_task_that_models_are_not_scored_on_is_refused(load: Load) -> None:
    with pytest.raises(UserError, match=r"data\.task=gsm8k: not in evaluation\.tasks"):
        trials(load(COMPARED))


def test_whole_students_are_not_scored_between_epochs(load: Load) -> None:
    sweep = load("axes: {training.adapter: [lora, full]}\nscheduler: {asha: {}}\n")
    with pytest.raises(UserError, match=r"trial training\.adapter=full: scheduler: .*LoRA"):
        trials(sweep)
