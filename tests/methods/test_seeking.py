from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn

from semalign import zoo
from semalign.config.sections import Seeking
from semalign.data.tokens import Tokens, tokenise
from semalign.errors import UserError
from semalign.methods.seeking.factors import (
    Factors,
    best_window,
    layer_sensitivities,
    low_rank,
    seek,
    sensitivity,
    top_layers,
)
from semalign.models.loading import load_config, load_model, load_tokenizer
from semalign.models.vocabulary import vocabulary_overlap
from semalign.tasks import load_split
from tests.models.architectures import make_config, make_model
from tests.reference import seeking as reference

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL = (*MODULES, "embed_tokens", "lm_head")
EXAMPLES = [
    Tokens("long", (1, 7, 9, 20, 33, 4, 2), 4),
    Tokens("one token of answer", (1, 5, 2), 2),
    Tokens("a prompt alone", (1, 5, 6), 3),
]
LITERAL = [(e.ids, e.prompt_length) for e in EXAMPLES if e.labelled]
TABLE = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 1, 1], [0, 0, 9, 9]])
TINY = {"hidden_size": 12, "intermediate_size": 10, "num_attention_heads": 3, "vocab_size": 48}
TINIER = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "vocab_size": 46}
ONE_KV = {"num_key_value_heads": 1}
EVERY = (torch.arange(48), torch.arange(48))
EVERY_SHARED = (torch.arange(46), torch.arange(46))


def tiny(shape: dict[str, int] = TINY, layers: int = 4, **changes: object) -> nn.Module:
    return make_model("llama", **shape, **ONE_KV, num_hidden_layers=layers, **changes)


def tinier_config(layers: int = 2, **changes: object) -> object:
    return make_config("llama", **{**TINIER, **ONE_KV, "num_hidden_layers": layers, **changes})


@pytest.mark.parametrize(
    ("shape", "found"),
    [((2, 2), (0, 2, 22)), ((2, 3), (0, 1, 30)), ((3, 2), (1, 2, 35)), ((4, 4), (0, 0, 66))],
)
def test_windows_by_hand(shape: tuple[int, int], found: tuple[int, int, float]) -> None:
    assert best_window(TABLE, shape) == found
    assert reference.best_window(TABLE.tolist(), shape) == found


def test_of_equal_windows_the_first() -> None:
    for value in (1.0, 0.1):
        assert best_window(torch.full((7, 9), value), (3, 4))[:2] == (0, 0)
    later = torch.zeros(5, 5)
    later[3, 1] = later[1, 3] = 0.3
    assert best_window(later, (1, 1))[:2] == (1, 3)


def test_windows_equal_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, m, rows, columns in [
        (9, 7, 4, 3),
        (6, 11, 6, 2),
        (5, 5, 1, 5),
        (8, 8, 8, 8),
        (1, 9, 1, 4),
    ]:
        scores = torch.rand(n, m, generator=generator) ** 4
        found = best_window(scores, (rows, columns))
        expected = reference.best_window(scores.tolist(), (rows, columns))
        assert found[:2] == expected[:2]
        assert found.sum == pytest.approx(expected[2], rel=1e-12)


def test_windows_that_cannot_be() -> None:
    with pytest.raises(UserError, match="no block of 5 x 2 in a matrix of 4 x 4"):
        best_window(TABLE, (5, 2))
    with pytest.raises(UserError, match="not finite"):
        best_window(torch.tensor([[1.0, float("nan")]]), (1, 1))


def test_low_rank_of_a_diagonal() -> None:
    b, a = low_rank(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    torch.testing.assert_close(b @ a, torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    torch.testing.assert_close(b.norm(dim=0), torch.tensor([3.0, 2.0]))  # all of Sigma


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_low_rank_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    block = torch.randn(shape, dtype=torch.float64)
    b, a = low_rank(block, rank)
    assert b.shape == (shape[0], min(rank, 5)) and a.shape == (min(rank, 5), shape[1])
    torch.testing.assert_close(b @ a, reference.low_rank(block, rank))
    torch.testing.assert_close(a @ a.T, torch.eye(len(a), dtype=torch.float64))
    left = torch.linalg.matrix_norm(block - b @ a, ord=2)
    expected = torch.cat([torch.linalg.svdvals(block), torch.zeros(9)])[rank]
    torch.testing.assert_close(left, expected, atol=1e-12, rtol=1e-12)


def test_the_best_layers_in_order() -> None:
    assert top_layers([1, 9, 3, 7], 2) == [1, 3]
    assert top_layers([4, 5, 4, 4], 3) == reference.top_layers([4, 5, 4, 4], 3) == [0, 1, 2]
    with pytest.raises(UserError, match=r"5 were asked for, the teacher has 1\.\.4"):
        top_layers([1, 9, 3, 7], 5)
    with pytest.raises(UserError, match="not finite"):
        top_layers([1, float("nan")], 1)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma2"])
def test_sensitivities_equal_one_gradient_at_a_time(family: str) -> None:
    model = make_model(family).double()
    found = sensitivity(model, EXAMPLES, ("v_proj", "down_proj", "embed_tokens", "lm_head"))
    expected = reference.sensitivity(model, LITERAL)
    if family in ("llama-tied", "gemma2"):
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    assert found.keys() == expected.keys() - {"model.norm.weight"}
    for name, total in found.items():
        kept = name.split(".")[-2] in ("v_proj", "down_proj", "embed_tokens", "lm_head")
        whole = kept and name.endswith(".weight")
        torch.testing.assert_close(total, expected[name] if whole else expected[name].sum())
    scores = [reference.layer_score(expected, layer) for layer in range(3)]
    assert layer_sensitivities(model, found) == pytest.approx(scores)


def test_sensitivities_of_a_low_precision_teacher_are_float32() -> None:
    model = make_model("llama")
    exact = sensitivity(model, EXAMPLES, MODULES)
    coarse = sensitivity(model.bfloat16(), EXAMPLES, MODULES)
    name = "model.layers.1.mlp.up_proj.weight"
    assert exact[name].dtype == coarse[name].dtype == torch.float32
    error = (coarse[name] - exact[name]).norm() / exact[name].norm()
    assert error < 0.05


def test_signed_sums_that_must_be_equal() -> None:
    """A loss knows q and k (v and o, up and down, head and final norm) only by their products."""
    model = make_model("llama", num_key_value_heads=4).double()
    found = reference.products(model, *LITERAL[0])
    for layer in range(3):
        q, k, v, o = (found[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkvo")
        up, down = (found[f"model.layers.{layer}.mlp.{x}_proj.weight"] for x in ("up", "down"))
        close(q.sum(), k.sum())
        close(v.sum(1), o.sum(0))
        close(up.sum(1), down.sum(0))
    close(found["lm_head.weight"].sum(), found["model.norm.weight"].sum())


def close(a: Tensor, b: Tensor) -> None:
    assert a.abs().max() > 1e-6
    torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-9)


def test_one_gradient_at_a_time_is_alive_and_nothing_is_left_behind() -> None:
    model = make_model("llama").requires_grad_(True)
    alive: list[int] = []
    mine = [
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
        for p in model.parameters()
    ]
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    sensitivity(model, EXAMPLES[:1], MODULES)
    assert set(alive) == {1} and len(alive) == 9 * 3  # seven matrices and two norms a layer
    for handle in mine:
        handle.remove()
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not model.lm_head.weight.requires_grad
    assert all(p.requires_grad for p in model.model.layers.parameters())
    with pytest.raises(IndexError):
        sensitivity(model, [Tokens("token 99 of 48", (1, 99, 2), 1)], MODULES)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_factors_equal_the_literal_ones(tied: bool) -> None:
    teacher = tiny(tie_word_embeddings=tied)
    ours, theirs = torch.tensor([0, 2, 3, 41, 45]), torch.tensor([0, 5, 1, 40, 47])
    factors = seek(teacher, tinier_config(), EXAMPLES, Seeking(rank=3, modules=ALL), (ours, theirs))
    sums = sensitivity(teacher, EXAMPLES, ALL)  # compared with the literal ones above
    literal = reference.sensitivity(teacher, LITERAL)
    kept = reference.top_layers([reference.layer_score(literal, i) for i in range(4)], 2)
    assert list(factors.layers) == kept and not factors.blocks
    assert len(factors.pairs) == len(factors.windows) == 2 * 7 + 2
    weights = dict(teacher.named_parameters(remove_duplicate=False))
    for path, (b, a) in factors.pairs.items():
        source = path
        for i, layer in enumerate(kept):
            source = source.replace(f".layers.{i}.", f".layers.from {layer}.")
        source = source.replace("from ", "") + ".weight"
        weight, scores = weights[source], sums[source]
        if path in ("model.embed_tokens", "lm_head"):
            args = (46, 8), ours.tolist(), theirs.tolist()
            block = reference.vocabulary_block(weight, scores, *args)
            block = block.T if path == "model.embed_tokens" else block
        else:
            block = reference.matrix_block(weight, scores, (b.shape[0], a.shape[1]))
        product = reference.low_rank(block, 3).float()
        torch.testing.assert_close(b @ a, product, atol=1e-5, rtol=1e-5)
    untouched = [row for row in range(46) if row not in ours.tolist()]
    assert not factors.pairs["lm_head"][0][untouched].any()
    assert not factors.pairs["model.embed_tokens"][1][:, untouched].any()


def test_a_student_of_the_teachers_size_gets_everything_in_order() -> None:
    teacher = tiny()
    settings = Seeking(modules=ALL, subtract="block", rank=16)
    factors = seek(teacher, teacher.config, EXAMPLES, settings, EVERY)
    assert factors.layers == (0, 1, 2, 3)
    assert all(window[:2] == (0, 0) for window in factors.windows.values())
    for path, (b, a) in factors.pairs.items():
        weight = teacher.get_submodule(path).weight
        assert torch.equal(factors.blocks[path], weight)
        product = (b @ a).T if path == "model.embed_tokens" else b @ a
        torch.testing.assert_close(product, weight, atol=1e-5, rtol=1e-5)  # rank 16 is all of it


def test_fewer_layers_than_the_student_has() -> None:
    factors = seek(tiny(), tinier_config(3), EXAMPLES, Seeking(layers=1), EVERY)
    assert len(factors.layers) == 1
    assert {path.split(".")[2] for path in factors.pairs} == {"0"}


@pytest.fixture(scope="module")
def seeds() -> list[Tokens]:
    examples = load_split(zoo.path("zoo/data"), "mmlu", "extract")[:2]
    return tokenise(examples, load_tokenizer("zoo/student"), max_length=512)


@pytest.mark.parametrize("name", ["zoo/teacher", "zoo/code-teacher"])
def test_the_shipped_family(name: str, seeds: list[Tokens]) -> None:
    overlap = vocabulary_overlap(load_tokenizer("zoo/student"), load_tokenizer(name))
    shared = (overlap.student_ids, overlap.teacher_ids)
    teacher, config = load_model(name), load_config("zoo/student")
    factors = seek(teacher, config, seeds[:1], Seeking(modules=ALL), shared)
    assert len(factors.layers) == 4 and len(factors.pairs) == 4 * 7 + 2
    b, a = factors.pairs["model.layers.3.self_attn.k_proj"]  # grouped-query: 64 x 128 of 96 x 192
    assert (b.shape, a.shape) == ((64, 16), (16, 128))
    b, a = factors.pairs["model.embed_tokens"]
    assert (b.shape, a.shape) == ((128, 16), (16, 640))
    column = factors.windows["lm_head"].column
    b, a = factors.pairs["lm_head"]
    rows = teacher.lm_head.weight[overlap.teacher_ids, column : column + 128]
    left = torch.linalg.matrix_norm(rows - (b @ a)[overlap.student_ids], ord=2)
    torch.testing.assert_close(left, torch.linalg.svdvals(rows)[16])


def test_files_say_the_same_and_are_equal_to_the_byte(tmp_path: Path) -> None:
    settings = Seeking(modules=("up_proj", "lm_head"), rank=2, subtract="block")
    found = [seek(tiny(), tinier_config(), EXAMPLES, settings, EVERY_SHARED) for _ in range(2)]
    for name, factors in zip(("one", "two"), found, strict=True):
        factors.save(tmp_path / "deep" / name)
    one, two = (tmp_path / "deep" / name for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in one.parent.iterdir()) == ["one", "two"]
    again = Factors.load(one)
    assert (again.layers, again.windows) == (found[0].layers, found[0].windows)
    for path, pair in found[0].pairs.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, again.pairs[path], strict=True))
        assert torch.equal(found[0].blocks[path], again.blocks[path])
    (tmp_path / "text").write_text("no factors")
    for wrong in ("absent", "text"):
        with pytest.raises(UserError, match="no file of Seeking's factors"):
            Factors.load(tmp_path / wrong)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"intermediate_size": 11},
            r"model.layers.0.mlp.gate_proj is 11 x 8, .* teacher's 10 x 12",
        ),
        ({"hidden_size": 16}, r"model.layers.0.self_attn.q_proj is 16 x 16, .* teacher's 12 x 12"),
        ({"layers": 5}, r"student has 5 layers and the teacher 4; expected 1\.\.4"),
    ],
)
def test_a_student_larger_than_its_teacher_is_refused(config: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        seek(tiny(), tinier_config(**config), EXAMPLES, Seeking(), EVERY_SHARED)


def test_what_cannot_be_sought_is_refused() -> None:
    for examples in ([], EXAMPLES[2:]):
        with pytest.raises(UserError, match="no example with an answer"):
            seek(tiny(), tinier_config(), examples, Seeking(), EVERY_SHARED)
    with pytest.raises(UserError, match="did you mean 'up_proj'"):
        seek(tiny(), tinier_config(), EXAMPLES, Seeking(modules=("up_prj",)), EVERY_SHARED)
    scaled = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**TINY, **ONE_KV, num_hidden_layers=4, logits_scaling=4.0)
    )
    with pytest.raises(UserError, match="GraniteModel: the LM head does not turn"):
        seek(scaled.eval(), tinier_config(), EXAMPLES, Seeking(), EVERY_SHARED)
    with pytest.raises(UserError, match=r"^extraction.device_map: part of the model is offloaded"):
        sensitivity(accelerate.cpu_offload(tiny()), EXAMPLES, MODULES)
    nothing = (torch.tensor([], dtype=torch.long),) * 2
    with pytest.raises(UserError, match="lm_head needs tokens that both"):
        seek(tiny(), tinier_config(), EXAMPLES, Seeking(modules=("lm_head",)), nothing)
