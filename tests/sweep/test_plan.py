"""The plan of a sweep: unions against brute force, bytes against files, every shipped sweep."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from semalign import zoo
from semalign.artifacts.activations import Column
from semalign.artifacts.artifact import Workspace
from semalign.artifacts.host import Host
from semalign.core.pairing import Pair, pair_layers
from semalign.errors import UserError
from semalign.stages.extraction import Activations
from semalign.stages.supervision import interfaces, teacher_columns
from semalign.sweep.file import load_sweep
from semalign.sweep.plan import SharedArtifact, SweepPlan, method_rows, plan_sweep, sweep_rows
from semalign.sweep.transfers import contents, transfers
from semalign.sweep.trials import Trial, trials
from semalign.tasks import load_split

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
TEACHER_LAYERS, STUDENT_LAYERS = 5, 3

Make = Callable[..., list[Trial]]


@pytest.fixture
def make(tmp_path: Path, family: dict[str, Path]) -> Make:
    """The trials of a sweep of the random family, from its axes in YAML."""

    def load(text: str, *overrides: str) -> list[Trial]:
        file = tmp_path / "try.yaml"
        file.write_text(text + "\n")
        models = [f"{role}={folder}" for role, folder in family.items()]
        small = ["data.train_limit=20", "extraction.shard_examples=8", "evaluation.tasks=[mmlu]"]
        return trials(load_sweep(file, [*models, *small, *overrides]))

    return load


def extractions(plan: SweepPlan) -> tuple[SharedArtifact, ...]:
    return plan.of_stage("extract")


def prefixes(plan: SweepPlan) -> tuple[SharedArtifact, ...]:
    return plan.of_stage("prefix")


def columns_of(shared: SharedArtifact) -> frozenset[Column]:
    assert isinstance(shared.artifact, Activations)
    return shared.artifact.columns


def pairs_of(trial: Trial, critical: tuple[int, ...]) -> list[Pair]:
    config = trial.config
    return pair_layers(
        config.pairing.strategy,
        num_teacher_layers=TEACHER_LAYERS,
        num_student_layers=STUDENT_LAYERS,
        critical=list(critical[: config.attribution.top_n]),
        seed=config.seed,
        explicit=list(config.pairing.explicit or ()),
        similarity=[[float(s == t % 2) for s in range(STUDENT_LAYERS)] for t in range(5)],
    )


def brute_force(
    found: list[Trial], critical: tuple[int, ...]
) -> tuple[set[tuple[int, str]], set[int]]:
    """The columns and the first trained layers of all trials, when attribution ranks layers so."""
    columns, first = set(), set()
    for trial in found:
        pairs = pairs_of(trial, critical)
        needed = teacher_columns(
            pairs,
            trial.config.loss,
            interfaces(trial.config.extraction),
            num_layers=TEACHER_LAYERS,
            extra_layers=[layer - 1 for layer in trial.config.extraction.layers],
        )
        columns |= {(column.layer, column.interface) for column in needed}
        first.add(min(pair.student for pair in pairs))
    return columns, first


KNOWN = """
base: {pairing: {strategy: last}}
axes:
  pairs:
    cases:
      last: {pairing.strategy: last}
      random: {pairing.strategy: random, attribution.top_n: 2}
      explicit: {pairing.strategy: explicit, pairing.explicit: [[2, 1], [4, 3]]}
  extraction.interface: [mlp, attn, both]
  loss.alpha: [0, 0.1, 1]
  loss.gamma: [0, 1]
  data.task: [mmlu, gsm8k]
seeds: [0, 1]
"""


def test_known_pairs_give_the_union_column_by_column(make: Make) -> None:
    found = make(KNOWN, "extraction.layers=[1]")
    plan = plan_sweep(found)
    assert plan.exact and plan.decided
    assert len(extractions(plan)) == len(prefixes(plan)) == 2  # one a task
    for planned in extractions(plan):
        mine = [trial for trial in found if trial.id in planned.trials]
        columns, first = brute_force(mine, (0, 1))
        assert {(c.layer, c.interface) for c in columns_of(planned)} == columns
        [prefix] = [p for p in prefixes(plan) if set(p.trials) == set(planned.trials)]
        assert {c.layer for c in columns_of(prefix)} == first
        assert planned.naive == sum(len(brute_force([trial], (0, 1))[0]) for trial in mine)
    assert plan.once.columns == sum(len(columns_of(p)) for p in extractions(plan))
    assert plan.naive.columns == sum(p.naive for p in extractions(plan))
    assert plan.once.attributions == 0 and plan.once.maps == 1
    assert len(plan.trials) == len(found) == 216
    # without an alignment term the interface has no part in a training
    assert plan.once.trainings == 216 - 216 // 3 * 2 // 3


UNDECIDED = """
base: {{pairing.strategy: last}}
axes:
  loss.gamma: [0, 1]
  pairing.strategy: [{strategies}]
  attribution.top_n: [1, 2]
  extraction.interface: [mlp, both]
"""


@pytest.mark.parametrize(
    "strategies",
    [
        "attributed",
        "proportional",
        "interpolated",
        "reverse, cka",
        "attributed, proportional, interpolated, cka, reverse",
    ],
)
def test_whatever_attribution_finds_needs_no_more_than_planned(make: Make, strategies: str) -> None:
    found = make(UNDECIDED.format(strategies=strategies))
    plan = plan_sweep(found)
    [extraction], [prefix] = extractions(plan), prefixes(plan)
    most, most_first = 0, 0
    for critical in itertools.permutations(range(TEACHER_LAYERS), 2):
        columns, first = brute_force(found, critical)
        most, most_first = max(most, len(columns)), max(most_first, len(first))
        assert max(layer for layer, _ in columns) < TEACHER_LAYERS
    assert most == plan.once.columns == extraction.count.most
    assert most_first <= plan.once.prefixes == prefix.count.most
    assert "cka" in strategies or most_first == plan.once.prefixes
    assert plan.once.columns <= TEACHER_LAYERS * 2 + 1 and plan.once.prefixes <= STUDENT_LAYERS
    assert not plan.exact and sweep_rows(plan)[1][2][1].startswith("≤")


def test_one_undecided_layer_is_one_column_whichever_it_is(make: Make) -> None:
    found = make("axes: {loss.alpha: [0.1, 1], extraction.interface: [mlp, both]}")
    plan = plan_sweep(found)
    assert plan.exact and not plan.decided
    for critical in range(TEACHER_LAYERS):
        columns, first = brute_force(found, (critical,))
        assert (plan.once.columns, plan.once.prefixes) == (len(columns), len(first)) == (2, 1)


def test_what_no_term_of_the_loss_needs_is_not_planned(make: Make) -> None:
    alone = plan_sweep(make("base: {loss.alpha: 0}\naxes: {loss.beta: [1, 2]}"))
    assert (alone.once.extractions, alone.once.columns, alone.once.maps) == (0, 0, 0)
    assert extractions(alone) == () and alone.once.prefixes == 1 and alone.exact
    only_kl = plan_sweep(make("base: {loss: {alpha: 0, gamma: 1}}"))
    assert columns_of(extractions(only_kl)[0]) == {Column(TEACHER_LAYERS - 1, "final")}
    assert only_kl.once.maps == 0 and only_kl.exact
    fisher = plan_sweep(make("base: {loss.objective: fisher}"))
    assert (fisher.once.columns, fisher.once.maps) == (1, 0)
    both = plan_sweep(make("base: {loss.gamma: 1}"))
    assert (both.once.columns, len(columns_of(extractions(both)[0]))) == (2, 4) and both.exact


def test_labels_share_an_extraction_and_wrong_ones_do_not(make: Make) -> None:
    found = make(
        "axes: {labels: {cases: {few: {data.labelled_limit: 4}, wrong: {data.label_noise: 0.5}}}}\n"
        "seeds: [0, 1]"
    )
    plan = plan_sweep(found)
    assert (plan.settings, plan.once.extractions, plan.once.trainings) == (3, 2, 6)


def test_bytes_are_those_of_the_files(make: Make, tmp_path: Path) -> None:
    """Every store of the plan is filled for real."""
    found = make(
        "axes: {pairing.explicit: [[[1, 1]], [[4, 2], [2, 3]]], extraction.positions: "
        "[all, answer], extraction.dtype: [bfloat16, float32]}\nbase: {pairing.strategy: last}"
    )
    plan = plan_sweep(found, transfers(found))
    workspace = Workspace(tmp_path / "work")
    host = Host(workspace)
    written = 0
    for planned in (*extractions(plan), *prefixes(plan)):
        store, folder = planned.artifact, workspace.place(planned.artifact)
        assert isinstance(store, Activations)
        store.make(folder, host)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        assert size == planned.step.cost.disk
        written += size
    assert plan.exact and len(extractions(plan)) == 4 and len(prefixes(plan)) == 1
    assert plan.once.stored == written


def test_trials_share_what_is_equal(make: Make) -> None:
    found = make(
        "base: {pairing: {strategy: last}}\n"
        "axes: {loss.alpha: [0.1, 1], alignment.map: [cosine, dual], adapter: {cases: "
        "{small: {training.lora.rank: 4}, whole: {training.adapter: full}}}}\nseeds: [0, 1, 2]"
    )
    plan = plan_sweep(found, held_back="test")
    assert (len(plan.trials), plan.settings, plan.seeds) == (27, 9, 3)
    once, naive = plan.once, plan.naive
    assert (once.attributions, once.extractions, once.columns, once.prefixes) == (0, 1, 1, 1)
    assert (naive.extractions, naive.columns, naive.prefixes) == (27,) * 3
    assert (once.maps, naive.maps) == (2, 27)
    assert once.engines == 1 + 12  # the student with its adapters, each merged student
    assert naive.engines == 2 * 27 + 12  # and the teacher
    # All on dev's 200; on test's 400 the student, and three seeds each of the base and the chosen.
    assert once.items == (1 + 27) * 200 + (1 + 2 * 3) * 400 and naive.items == 3 * 27 * 600
    assert once.operations < naive.operations
    assert once.disk > once.stored > 0


def test_a_comparison_scores_students_and_teachers_on_every_task(make: Make) -> None:
    """A trial answers its own task's 200 items of test, either model those of both tasks."""
    found = make(
        "axes: {data.task: [mmlu, gsm8k], method: [sft, laten]}\n"
        "compare: {axis: method, control: sft}\nbase: {evaluation: {splits: [test]}}",
        "evaluation.tasks=[mmlu,gsm8k]",
    )
    once = plan_sweep(found, compared=True).once
    items = {
        task: len(load_split(zoo.path("zoo/data"), task, "test")) for task in ("mmlu", "gsm8k")
    }
    assert once.items == (2 + 2) * sum(items.values())
    assert once.engines == 2 + 2  # and each of LaTen's students
    alone = plan_sweep(found).once
    assert alone.items == 2 * sum(items.values()) + items["mmlu"]
    chosen = plan_sweep(found, held_back="test").once  # the student, it and the base on test
    assert chosen.items == (1 + 2) * items["mmlu"]
    assert alone.engines == 1 + 2


def test_hardware_and_repeats_train_once(make: Make) -> None:
    found = make("axes: {extraction.layers: [[], [2]]}", "training.num_workers=2")
    assert len(found) == 2 and found[0].id == make("axes: {}")[0].id
    assert plan_sweep(found).once.trainings == 1
    assert plan_sweep(make("axes: {pairing.strategy: [cka, attributed]}")).once.maps == 1


def test_inputs_are_read_once(make: Make) -> None:
    found = make("axes: {loss.alpha: [0.1, 1], data.task: [mmlu, gsm8k]}\nseeds: [0, 1]")
    read = transfers(found)
    assert len({id(each.inputs) for each in read.values()}) == 2
    assert [trial.id for trial in found] == list(read)


def test_what_inputs_lack_is_reported(make: Make) -> None:
    for axes, message in (
        ("pairing.strategy: [attribted]", "pairing.strategy=attribted: did you mean 'attributed'?"),
        ("pairing.explicit: [[[6, 1]]]", "pairing.explicit: teacher layer 6 is out of range"),
        ("extraction.layers: [[], [9]]", "extraction.layers: teacher layer 9 is out of range"),
        ("attribution.top_n: [6]", "attribution.top_n=6: the teacher has 5 layers"),
        ("data.train_split: [trian]", "no split 'trian'; did you mean 'train'?"),
        ("data.root: [nowhere]", "data.root=nowhere: no such folder"),
    ):
        with pytest.raises(UserError) as error:
            plan_sweep(make(f"axes: {{{axes}}}", "evaluation.root=zoo/data"))
        assert message in str(error.value)


def test_random_pairs_do_not_wait_for_attribution(make: Make) -> None:
    found = make("base: {pairing.strategy: random, attribution.top_n: 2}\nseeds: [0, 1, 2, 3]")
    read = transfers(found)
    plan = plan_sweep(found, read)
    assert plan.exact and plan.decided and plan.once.attributions == 0
    for trial in found:
        [recipe] = read[trial.id].possible()
        for critical in itertools.permutations(range(TEACHER_LAYERS), 2):
            assert list(recipe.pairs) == pairs_of(trial, critical)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_shipped_sweep_plans(file: Path) -> None:
    assert file.read_text().startswith("# ")
    plan: SweepPlan = plan_sweep(trials(load_sweep(file)))
    number = len(plan.trials)
    assert plan.once.attributions < number or number < 7
    assert plan.once.columns <= 12 and plan.once.extractions <= 4
    assert plan.once.stored < plan.naive.stored
    head, body = sweep_rows(plan)
    assert f"{number} trials" in head[0]
    assert all(len(row) == 3 for row in body)


def test_all_shipped_sweeps_are_known() -> None:
    expected = "adapter attribution decomposition interface labels layers loss_weights objective"
    assert [f.stem for f in SWEEPS] == [
        *expected.split(),
        "pairing",
        "pairs",
        "smoke",
        "table1",
        "table2",
    ]


def test_columns_count_from_0(make: Make) -> None:
    [trial] = make("base: {pairing: {strategy: explicit, explicit: [[5, 3]]}}")
    plan = plan_sweep([trial])
    assert columns_of(extractions(plan)[0]) == {Column(4, "mlp")}
    assert columns_of(prefixes(plan)[0]) == {Column(2, "input")}


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_the_papers_own_models_are_planned_without_them(name: str) -> None:
    """Table 3's shapes: memory and parameters of every method from 13B to 7B."""
    sweep = load_sweep(SWEEPS[0].with_name(f"{name}.yaml"), ["models=llama2"])
    plan = plan_sweep(trials(sweep))
    assert "meta-llama/Llama-2-7b-chat-hf" in plan.absent
    assert len(plan.absent) == {"table1": 2, "table2": 4}[name]
    _, body = method_rows(plan, "method")
    shown = {method: (trained, largest) for method, trained, _, _, largest in body}
    assert shown["seeking"][0] == "39,976,960" and shown["seeking"][1].endswith("(seek)")
    assert shown["laten"][0] == "188,743,680" and shown["laten"][1].endswith("(translate)")
    assert shown["semalign"][0] == shown["sft"][0] == shown["logit-kd"][0] == "745,472"


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_rows_under_the_same_name_are_another_sweep(
    make: Make, tmp_path: Path, split: str
) -> None:
    root = tmp_path / "data"
    shutil.copytree(zoo.path("zoo/data"), root)
    found = make("axes: {loss.alpha: [0, 0.1]}", f"data.root={root}")
    before = contents(transfers(found))
    assert contents(transfers(found)) == before
    file = root / "mmlu" / f"{split}.jsonl"
    first, rest = file.read_text().split("\n", 1)
    file.write_text(first.replace("?", "??", 1).replace(".", "..", 1) + "\n" + rest)
    assert contents(transfers(found)) != before
