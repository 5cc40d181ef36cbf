"""LaTen: location, translation, training and baking, against the literal reference."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from semalign import zoo
from semalign.config.sections import Laten
from semalign.data.tokens import Tokens, tokenise
from semalign.errors import Diverged, UserError
from semalign.methods.laten import hypernet as laten_hypernet
from semalign.methods.laten import neurons as laten_neurons
from semalign.methods.laten.hypernet import (
    Delta,
    add_to_weights,
    hypernetwork,
    initialise,
    injected,
    moves,
    size_penalty,
    translate,
)
from semalign.methods.laten.neurons import (
    Located,
    LogitLens,
    best_neurons,
    locate,
    log_p,
    neuron_scores,
    sublayer_scores,
)
from semalign.methods.laten.steps import accumulate, drawn, one_cycle, train_hypernetwork
from semalign.methods.laten.trace import (
    NEURON_KINDS,
    Query,
    in_teacher_ids,
    last_useful,
    output_weight,
    trace,
    value_rows,
)
from semalign.methods.laten.transfer import (
    Translation,
    bake,
    neuron_counts,
    planned_steps,
    translate_neurons,
)
from semalign.models.decoder import find_decoder
from semalign.models.loading import load_model, load_tokenizer
from semalign.models.vocabulary import vocabulary_overlap
from semalign.tasks import load_split
from tests.models.architectures import count_hooks, make_model, save_checkpoint, shared_model
from tests.reference import laten as reference

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma"]
QUERY = Query("q", (1, 7, 30, 12, 9, 40), 23)
COUNTS = {"ffn": 5, "attn": 6}


@dataclass(frozen=True)
class Example:
    id: str
    ids: tuple[int, ...]
    prompt_length: int


def rows(count: int, *, seed: int, vocabulary: int = 48, length: int = 9) -> list[Example]:
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.manual_seed(seed))
    return [Example(f"{seed}/{i}", tuple(row), length - 4) for i, row in enumerate(ids.tolist())]


def gain(model: nn.Module) -> Tensor:
    """The final norm's weight; Gemma's is stored without its 1."""
    return model.model.norm.weight + (1 if model.config.model_type == "gemma" else 0)


def observed(model: nn.Module, query: Query = QUERY) -> reference.Observed:
    with torch.no_grad():
        return reference.Observed(model, list(query.ids), gain(model))


def other_norms(family: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A model whose norms are not all ones, as those of a trained one."""
    model = make_model(family, seed=seed, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return model


# Location


@pytest.mark.parametrize(
    ("family", "readout"), [*((f, "correct") for f in FAMILIES), ("llama", "as_coded")]
)
def test_scores_and_choices_equal_the_literal_ones(
    family: str, readout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laten_neurons, "PIECE", 48 * 7)  # 7 neurons at a time
    model = other_norms(family)
    decoder, literal = find_decoder(model), observed(model)
    eps = getattr(model.model.norm, "variance_epsilon", None) or model.model.norm.eps
    s = literal.scale(readout, eps)
    expected_layers = literal.layer_scores(s, QUERY.target)
    expected = literal.neuron_scores(s, QUERY.target)
    lens, seen = LogitLens.of(decoder), trace(decoder, QUERY)
    scale = lens.scale(seen, readout)
    assert float(scale) == pytest.approx(s, rel=1e-5)
    found = sublayer_scores(lens, seen, scale)
    chosen = locate(model, [QUERY], num_layers=2, counts=COUNTS, readout=readout)[0]
    for kind in NEURON_KINDS:
        assert found[kind].tolist() == pytest.approx(expected_layers[kind], abs=2e-5)
        layers = reference.best_layers(expected_layers[kind], 2)
        assert list(chosen[kind].layers) == layers
        for layer, neurons in zip(layers, chosen[kind].chosen.tolist(), strict=True):
            scores = neuron_scores(
                lens,
                output_weight(decoder, layer, kind),
                base=seen.base(kind)[layer][None],
                coefficients=seen.coefficients[kind][layer][None],
                scales=scale[None],
                targets=[QUERY.target],
            )[0].tolist()
            assert scores == pytest.approx(expected[kind][layer], abs=2e-5)
            assert neurons == reference.best_neurons(scores, COUNTS[kind])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_neurons_add_up_to(family: str) -> None:
    model = shared_model(family)
    decoder, literal = find_decoder(model), observed(model)
    seen = trace(decoder, QUERY)
    alone = trace(decoder, Query("one token", QUERY.ids[:1], 5))
    for layer in range(3):
        down, o = (output_weight(decoder, layer, kind) for kind in NEURON_KINDS)
        ffn = down @ seen.coefficients["ffn"][layer]
        torch.testing.assert_close(ffn, seen.ffn[layer], atol=1e-5, rtol=1e-4)
        every_key = o @ literal.all_keys[layer]
        torch.testing.assert_close(every_key, seen.attn[layer], atol=1e-5, rtol=1e-4)
        own_key = o @ seen.coefficients["attn"][layer]  # the authors' neurons: position T alone
        assert (own_key - seen.attn[layer]).abs().max() > 1e-2
        torch.testing.assert_close(
            o @ alone.coefficients["attn"][layer], alone.attn[layer], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_correct_readout_of_the_last_state_is_the_models(family: str) -> None:
    model = other_norms(family)
    decoder = find_decoder(model)
    lens, seen = LogitLens.of(decoder), trace(decoder, QUERY)
    expected = model(torch.tensor([QUERY.ids])).logits[0, -1]
    found = lens.logits(seen.last, lens.scale(seen, "correct"))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    coded = lens.logits(seen.last, lens.scale(seen, "as_coded"))
    assert (coded - expected).abs().max() > 0.1


def test_a_silent_neuron_scores_nothing_and_ties_go_to_the_first() -> None:
    decoder = find_decoder(shared_model("llama"))
    lens, seen = LogitLens.of(decoder), trace(decoder, QUERY)
    scores = neuron_scores(
        lens,
        output_weight(decoder, 1, "ffn"),
        base=seen.base("ffn")[1][None],
        coefficients=torch.zeros(1, 40),
        scales=lens.scale(seen, "correct")[None],
        targets=[QUERY.target],
    )
    assert scores.abs().max() < 1e-6
    assert best_neurons(scores[0], 4).tolist() == [0, 1, 2, 3]
    tied = torch.tensor([0.10001, 0.3, 0.10004, -0.00001, 0.3, 0.00001])
    assert best_neurons(tied, 6).tolist() == [1, 4, 0, 2, 3, 5]


def test_examples_are_located_together_as_alone_and_leave_nothing_behind() -> None:
    model = shared_model("qwen3")
    queries = [Query(str(i), row.ids[:-1], row.ids[-1]) for i, row in enumerate(rows(4, seed=3))]
    before, attention = count_hooks(model), model.config._attn_implementation
    together = locate(model, queries, num_layers=2, counts=COUNTS)
    assert count_hooks(model) == before and model.config._attn_implementation == attention
    assert len({located["ffn"].layers for located in together}) > 1  # each its own layers
    for query, located in zip(queries, together, strict=True):
        (alone,) = locate(model, [query], num_layers=2, counts=COUNTS)
        for kind in NEURON_KINDS:
            assert alone[kind].layers == located[kind].layers
            assert torch.equal(alone[kind].chosen, located[kind].chosen)


def test_the_last_useful_token() -> None:
    tokenizer = load_tokenizer("zoo/student")

    def decode(id_: int) -> str:
        return tokenizer.decode([id_], skip_special_tokens=True)

    def cut(text: str, prompt_length: int = 2) -> str:
        ids = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
        query = last_useful(Tokens("x", ids, prompt_length), decode)
        assert query.ids == ids[: len(query.ids)] and query.target == ids[len(query.ids)]
        return decode(query.target)

    assert cut("def f(x):\n    return [max(x, 7)]\n") == "7"
    assert cut('He has 12. "64" . \n') == "4"
    with pytest.raises(UserError, match=r"example x: its answer has nothing but punctuation"):
        cut('7 ") . \n', 1)


def test_tokens_are_asked_in_the_teachers_ids() -> None:
    table = [0, 2, 1, -1]
    assert in_teacher_ids(Query("x", (1, 2), 0), table) == Query("x", (2, 1), 0)
    with pytest.raises(UserError, match=r"example x: its last useful token, student id 3, is not"):
        in_teacher_ids(Query("x", (1, 2), 3), table)
    with pytest.raises(UserError, match=r"example x: a token, student id 3, is not"):
        in_teacher_ids(Query("x", (1, 3), 0), table)


# Sizes


def test_sizes_of_the_paper() -> None:
    assert neuron_counts(0.1, 11008, 4096) == {"ffn": 1100, "attn": 409}
    assert neuron_counts(0.29, 100, 50) == {"ffn": 29, "attn": 14}  # not 28.999..
    with torch.device("meta"):
        net = hypernetwork(5120, 4096)
    assert sum(p.numel() for p in net.parameters()) == 188_743_680
    assert [planned_steps(Laten(), task, 20) for task in ("mmlu", "gsm8k")] == [2, 4]
    assert [planned_steps(Laten(), task, 20) for task in ("humaneval", "mbpp")] == [3, 8]
    assert planned_steps(Laten(steps=5), "mmlu", 20) == 5
    assert planned_steps(Laten(), "mbpp", 6) == 6
    with pytest.raises(UserError, match=r"laten.steps=50: expected at most 32, one for each row"):
        planned_steps(Laten(steps=50), "mmlu", 32)


@pytest.mark.parametrize("cycle", [1, 2, 5, 9, 11, 20, 32, 128])
def test_the_schedule_is_torchs(cycle: int) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-5, total_steps=cycle, pct_start=0.1, final_div_factor=1
    )
    for step in range(cycle):
        lr, beta1 = one_cycle(step, cycle, 3e-5)
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert beta1 == pytest.approx(optimizer.param_groups[0]["betas"][0], rel=1e-9)
        optimizer.step()
        if step + 1 < cycle:
            schedule.step()


def test_learning_rates_of_the_first_steps() -> None:
    assert [one_cycle(i, 20, 3e-5)[0] for i in range(3)] == pytest.approx(
        [1.2e-6, 3e-5, 2.98e-5], rel=2e-3
    )
    assert [one_cycle(i, 32, 3e-5)[0] for i in range(3)] == pytest.approx(
        [1.2e-6, 1.36e-5, 2.94e-5], rel=5e-3
    )
    assert one_cycle(0, 10, 3e-5) == pytest.approx((3e-5, 0.85))  # torch divides by zero


# Translation


@dataclass
class Case:
    teacher: nn.Module
    student: nn.Module
    net: nn.ModuleDict
    teacher_neurons: Located
    student_neurons: Located

    @property
    def wanted(self) -> list[Any]:
        decoders = find_decoder(self.teacher), find_decoder(self.student)
        return moves(*decoders, self.teacher_neurons, self.student_neurons)


def make_case(family: str = "llama", *, std: float = 0.15, seed: int = 0) -> Case:
    """A wider, deeper teacher; a hypernetwork whose deltas are felt."""
    teacher = make_model(
        family,
        seed=1,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=4,
        **({"layer_types": ["full_attention"] * 4} if family == "qwen2" else {}),
    )
    student = make_model(family, seed=2)
    query = Query("q", tuple(rows(1, seed=seed)[0].ids[:-1]), 11)
    shape = {"num_layers": 2, "counts": {"ffn": 6, "attn": 20}}
    net = hypernetwork(48, 32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    (teacher_neurons,), (student_neurons,) = (
        locate(teacher, [query], **shape),
        locate(student, [query], **shape),
    )
    return Case(teacher, student, net, teacher_neurons, student_neurons)


@pytest.mark.parametrize("family", FAMILIES)
def test_baked_is_hooked_is_dense(family: str) -> None:
    case = make_case(family)
    decoder = find_decoder(case.student)
    ids = torch.tensor([QUERY.ids])
    with torch.no_grad():
        base = case.student(ids).logits
        deltas = translate(case.net, case.wanted)
        with injected(decoder, deltas):
            hooked = case.student(ids).logits
        added, penalty = reference.dense_deltas(
            case.net, case.teacher, case.student, case.teacher_neurons, case.student_neurons
        )
        weights = {k: p + added.get(k, 0) for k, p in case.student.named_parameters()}
        dense = torch.func.functional_call(case.student, weights, (ids,)).logits
        assert torch.equal(case.student(ids).logits, base)  # no hook is left
        add_to_weights(decoder, deltas)
        baked = case.student(ids).logits
    assert (hooked - base).abs().max() > 0.05
    torch.testing.assert_close(hooked, dense, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hooked, baked, atol=1e-4, rtol=1e-4)
    assert float(size_penalty(deltas)) == pytest.approx(float(penalty), rel=1e-4)
    for key, parameter in case.student.named_parameters():
        torch.testing.assert_close(parameter, weights[key], atol=1e-5, rtol=1e-5)


def test_query_heads_that_share_a_value_head_add_up() -> None:
    decoder = find_decoder(shared_model("qwen3"))  # 4 heads of 12, 2 value heads
    every = value_rows(decoder, torch.arange(48))
    heads = torch.arange(24).view(2, 12).repeat_interleave(2, dim=0)
    assert torch.equal(every, heads.flatten())
    case = make_case("qwen3")
    assert any(
        len(set(move.index.tolist())) < len(move.index)
        for move in case.wanted
        if move.name == "v_proj"
    )  # so the tests above met it
    repeated = torch.tensor([7, 3, 7, 0, 3, 7])
    once, summing = laten_hypernet._each_once(repeated)
    assert once.tolist() == [0, 3, 7]
    values = torch.randn(6, generator=torch.manual_seed(0))
    torch.testing.assert_close(
        torch.zeros(9).index_add(0, once, values @ summing),
        torch.zeros(9).index_add(0, repeated, values),
    )
    same, nothing = laten_hypernet._each_once(repeated[:2])
    assert same.tolist() == [7, 3] and nothing is None  # rows keep their order


def test_nothing_added_is_the_student_to_the_bit(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "llama-tied")
    student = load_model(base)
    case = make_case("llama-tied", std=0.0)
    deltas = translate(case.net, case.wanted)
    ids = torch.tensor([QUERY.ids])
    expected = student(ids).logits
    with injected(find_decoder(student), deltas):
        assert torch.equal(student(ids).logits, expected)
    bake(base, deltas, tmp_path / "out")
    baked = load_model(tmp_path / "out")
    assert torch.equal(baked(ids).logits, expected)
    for key, parameter in student.state_dict().items():
        assert torch.equal(baked.state_dict()[key], parameter)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3"])
def test_a_baked_checkpoint_reloads_as_it_was(family: str, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", family, dtype="bfloat16")
    case = make_case(family)
    deltas = [delta.to("cpu") for delta in translate(case.net, case.wanted)]
    for _ in range(2):  # the second replaces the first
        bake(base, deltas, tmp_path / "out")
    memory = load_model(base)
    add_to_weights(find_decoder(memory), deltas)
    reloaded = load_model(tmp_path / "out")
    ids = torch.tensor([QUERY.ids])
    assert torch.equal(reloaded(ids).logits, memory(ids).logits)
    assert load_tokenizer(tmp_path / "out").get_vocab() == load_tokenizer(base).get_vocab()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    tied = reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert tied == (family != "llama")


# Training


def test_steps_equal_whole_matrices_and_plain_autograd() -> None:
    case, second = make_case(), make_case(seed=7)
    align, examples = rows(5, seed=1), rows(2, seed=2)
    settings = Laten(pool=4, lr=3e-3, size_penalty=2.0)
    literal = copy.deepcopy(case.net)
    history = train_hypernetwork(
        case.net,
        find_decoder(case.student),
        [case.wanted, second.wanted],
        examples,
        align,
        cycle=6,
        settings=settings,
        seed=5,
    )
    pools = [[*drawn(align, 3, 500_015 + i), examples[i]] for i in range(2)]
    assert len({row.id for row in pools[0]}) == 4 and pools[0][:3] != pools[1][:3]
    losses = reference.train(
        literal,
        case.teacher,
        case.student,
        [
            (case.teacher_neurons, case.student_neurons),
            (second.teacher_neurons, second.student_neurons),
        ],
        pools,
        cycle=6,
        lr=3e-3,
        weight_decay=0.05,
        weight=2.0,
    )
    assert [step.loss for step in history] == pytest.approx(losses, rel=1e-4)
    assert [step.step for step in history] == [1, 2]
    for step in history:
        assert step.loss == pytest.approx(step.cross_entropy + 2 * step.penalty)
    for ours, theirs in zip(case.net.parameters(), literal.parameters(), strict=True):
        moved = (theirs - ours).abs() > 2e-5  # Adam's sign of a gradient of rounding error
        assert moved.float().mean() < 0.002


def test_gradients_reach_the_hypernetwork_alone() -> None:
    case = make_case()
    literal = copy.deepcopy(case.net)
    align = rows(3, seed=1)
    entropy, penalty = accumulate(case.net, find_decoder(case.student), case.wanted, align, 10.0)
    total = torch.zeros(())
    for row in align:
        added, size = reference.dense_deltas(
            literal, case.teacher, case.student, case.teacher_neurons, case.student_neurons
        )
        weights = {k: p + added.get(k, 0) for k, p in case.student.named_parameters()}
        total = total + reference.answer_loss(case.student, weights, row) + 10.0 * size
    total.backward()
    assert entropy + 10 * penalty == pytest.approx(total.item() / 3, rel=1e-5)
    for ours, theirs in zip(case.net.parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)
    frozen = [*case.student.parameters(), *case.teacher.parameters()]
    assert all(parameter.grad is None for parameter in frozen)
    assert count_hooks(case.student) == 0


def test_operations_of_the_hypernetwork() -> None:
    case = make_case()
    with FlopCounterMode(display=False) as counted:
        accumulate(case.net, find_decoder(case.student), case.wanted, [], 1.0)
    vectors = sum(len(move.index) for move in case.wanted)
    assert vectors == 2 * 2 * (6 + 20)
    assert counted.get_total_flops() == vectors * 48 * (6 * 48 + 8 * 32)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made in memory that was not there before."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.numel = 0
        self.known = {p.untyped_storage().data_ptr() for m in models for p in m.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for made in output if isinstance(output, tuple | list) else [output]:
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, made.untyped_storage().nbytes() // made.itemsize)
        return output


def test_no_matrix_of_the_modules_size_is_ever_made() -> None:
    wide = {"hidden_size": 64, "intermediate_size": 2048, "num_hidden_layers": 2}
    teacher, student = (make_model("llama", seed=seed, **wide) for seed in (1, 2))
    query = Query("q", QUERY.ids, QUERY.target)
    shape = {"num_layers": 2, "counts": {"ffn": 20, "attn": 6}}
    (teacher_neurons,), (student_neurons,) = (
        locate(teacher, [query], **shape),
        locate(student, [query], **shape),
    )
    wanted = moves(find_decoder(teacher), find_decoder(student), teacher_neurons, student_neurons)
    net = hypernetwork(64, 64)
    initialise(net, 0)
    with Largest(teacher, student) as largest:
        accumulate(net, find_decoder(student), wanted, rows(2, seed=1), 1000.0)
    assert largest.numel == 9 * 2048  # the activations of 9 tokens; a delta would be 64 * 2048
    with Largest(teacher, student) as largest:
        reference.dense_deltas(net, teacher, student, teacher_neurons, student_neurons)
    assert largest.numel == 64 * 2048


# The whole


def decoder_of(tokenizer: Any) -> Any:
    return lambda id_: tokenizer.decode([id_], skip_special_tokens=True)


def run(teacher: str = "zoo/teacher", task: str = "gsm8k", seed: int = 0, **changes: Any) -> Any:
    tokenizer = load_tokenizer("zoo/student")
    splits = {}
    for name, split, count in (
        ("train", "train", 3), ("attribution", "extract", 3), ("align", "align", 5),
    ):  # fmt: skip
        examples = load_split(zoo.path("zoo/data"), task, split)[
            : changes.pop(f"{name}_rows", count)
        ]
        splits[name] = tokenise(examples, tokenizer, max_length=512)
    student = changes.pop("student", None) or load_model(zoo.path("zoo/student"))
    models = load_model(zoo.path(teacher)), student
    rows_ = [len(find_decoder(model).lm_head.weight) for model in models]
    overlap = vocabulary_overlap(
        tokenizer, load_tokenizer(teacher), student_rows=rows_[1], teacher_rows=rows_[0]
    )
    seen: list[Any] = []
    result = translate_neurons(
        *models,
        **splits,
        student_to_teacher=overlap.student_to_teacher,
        decode=decoder_of(tokenizer),
        task=task,
        settings=Laten(**{"pool": 3, **changes}),
        seed=seed,
        on_step=seen.append,
    )
    assert seen == result.steps
    return result


@pytest.fixture(scope="module")
def result() -> Translation:
    return run()


def test_a_transfer_of_the_shipped_family(result: Translation, tmp_path: Path) -> None:
    assert [step.step for step in result.steps] == [1, 2, 3]  # 4 of Table 4, 3 rows
    assert len({step.example for step in result.steps}) == 3
    assert result.located_by.startswith("gsm8k/")
    assert result.parameters == 4 * (192 * 192 + 192 * 128)
    assert len(result.deltas) == 4 * 4
    shapes = {delta.name: tuple(delta.value.shape) for delta in result.deltas}
    assert shapes == {
        "up_proj": (25, 128), "down_proj": (25, 128), "v_proj": (12, 128), "o_proj": (12, 128),
    }  # fmt: skip
    assert all(0 < delta.value.abs().max() < 1e-3 for delta in result.deltas)
    assert all(0 < step.penalty < 1e-6 and 0 < step.cross_entropy < 9 for step in result.steps)
    bake(zoo.path("zoo/student"), result.deltas, tmp_path / "out")
    baked = load_model(tmp_path / "out").state_dict()
    changed = {
        key.split(".")[-2]
        for key, value in load_model(zoo.path("zoo/student")).state_dict().items()
        if not torch.equal(value, baked[key])
    }
    assert changed == {"up_proj", "down_proj", "v_proj", "o_proj"}


def test_the_seed_decides(result: Translation) -> None:
    torch.manual_seed(9)
    student = load_model(zoo.path("zoo/student"))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    state = torch.random.get_rng_state()
    again, other = run(student=student), run(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    assert again.steps == result.steps and again.located_by == result.located_by
    for a, b in zip(again.deltas, result.deltas, strict=True):
        assert torch.equal(a.value, b.value) and torch.equal(a.index, b.index)
    assert other.steps != result.steps


def test_a_teacher_with_one_more_token_and_a_single_row() -> None:
    found = run("zoo/code-teacher", "mbpp", attribution_rows=1, train_rows=1, align_rows=1)
    assert len(found.steps) == 1 and found.steps[0].lr == pytest.approx(1.2e-6)
    assert len(found.deltas) == 16


def test_fewer_layers_and_bfloat16() -> None:
    student = load_model(zoo.path("zoo/student"), dtype="bfloat16")
    found = run(student=student, layers=2, steps=1, readout="as_coded")
    assert len(found.deltas) == 8
    assert all(delta.value.dtype == torch.float32 for delta in found.deltas)
    assert all(delta.value.abs().max() > 0 for delta in found.deltas)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align_rows": 0}, r"split align: no rows; LaTen needs"),
        ({"attribution_rows": 0}, r"split attribution: no rows"),
        ({"cycle": 1, "steps": 2}, r"laten.cycle=1: expected at least the 2 steps"),
        ({"steps": 4}, r"laten.steps=4: expected at most 3, .* row of data.attribution_split"),
        ({"layers": 5}, r"laten.layers: 5 layers .*, the student has 1\.\.4"),
        ({"share": 0.001}, r"laten.share: 0 ffn neurons .*, the student has 1\.\.256"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(**changes)
    assert "\n" not in str(caught.value)


def test_models_of_another_form_or_size_are_refused() -> None:
    shape = {"num_layers": 3, "counts": COUNTS, "who": "teacher"}
    with pytest.raises(UserError, match=r"the teacher \(Gemma2Model\) has a norm behind"):
        locate(shared_model("gemma2"), [QUERY], **shape)
    with pytest.raises(UserError, match=r"laten.layers: 4 layers .*, the teacher has 1\.\.3"):
        locate(shared_model("llama"), [QUERY], **{**shape, "num_layers": 4})
    with pytest.raises(UserError, match=r"laten.share: 41 ffn neurons .*, the teacher has 1\.\.40"):
        locate(shared_model("llama"), [QUERY], **{**shape, "counts": {"ffn": 41, "attn": 1}})
    fused = make_model("llama")
    fused.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(UserError, match=r"layer 2 \(counted from 1\) has no mlp.up_proj"):
        locate(fused, [QUERY], **shape)
    shifted = make_model("llama")
    shifted.model.norm = nn.LayerNorm(32)
    with pytest.raises(UserError, match=r"final norm is no RMS norm"):
        locate(shifted, [QUERY], **shape)
    with pytest.raises(UserError, match=r"laten.readout=right: expected one of"):
        locate(shared_model("llama"), [QUERY], **shape, readout="right")
    broken = make_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.inf
    with pytest.raises(UserError):
        locate(broken, [QUERY], **shape)


def test_offloaded_models_are_refused() -> None:
    model = accelerate.cpu_offload(make_model("llama"))
    with pytest.raises(UserError, match=r"^extraction.device_map: part of the model is offloaded"):
        locate(model, [QUERY], num_layers=2, counts=COUNTS)


def test_half_precision_and_a_lost_loss_are_refused() -> None:
    with pytest.raises(UserError, match=r"dtype=float16"):
        run(student=load_model(zoo.path("zoo/student"), dtype="float16"))
    case = make_case()
    with torch.no_grad():
        case.student.lm_head.weight[5] = torch.nan
    before = [parameter.clone() for parameter in case.net.parameters()]
    with pytest.raises(Diverged, match=r"loss is nan at step 1; among the examples"):
        train_hypernetwork(
            case.net, find_decoder(case.student), [case.wanted], rows(1, seed=2), rows(5, seed=1),
            cycle=2, settings=Laten(pool=3), seed=0,
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, case.net.parameters(), strict=True))


def test_log_p_is_a_log_softmax() -> None:
    logits, targets = torch.randn(3, 7) * 50, torch.tensor([0, 6, 3])
    expected = logits.log_softmax(-1)[torch.arange(3), targets]
    torch.testing.assert_close(log_p(logits, targets), expected)


def test_a_delta_is_where_it_says() -> None:
    student = make_model("llama")
    decoder = find_decoder(student)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    ones = torch.ones(2, 32)
    add_to_weights(
        decoder,
        [
            Delta(1, "v_proj", torch.tensor([3, 3]), ones),
            Delta(2, "down_proj", torch.tensor([0, 5]), ones * 2),
        ],
    )
    v = (
        student.model.layers[1].self_attn.v_proj.weight
        - before["model.layers.1.self_attn.v_proj.weight"]
    )
    down = (
        student.model.layers[2].mlp.down_proj.weight - before["model.layers.2.mlp.down_proj.weight"]
    )
    assert v.abs().sum(1).nonzero().flatten().tolist() == [3]
    torch.testing.assert_close(v[3], torch.full((32,), 2.0))
    assert down.abs().sum(0).nonzero().flatten().tolist() == [0, 5]
