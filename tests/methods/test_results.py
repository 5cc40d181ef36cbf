"""Every method's result says the same after it is saved and loaded; what it costs is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM

from semalign import zoo
from semalign.artifacts.activations import Column
from semalign.config.jobs import Config
from semalign.config.read import resolve
from semalign.config.sections import Lora, Seeking
from semalign.data.batches import pad
from semalign.data.tokens import Tokens, fingerprint, tokenise, translate
from semalign.errors import UserError
from semalign.methods.laten import transfer as laten
from semalign.methods.laten.hypernet import injected
from semalign.methods.laten.transfer import labelled_rows
from semalign.methods.seeking.factors import seek
from semalign.models.adapters import load_adapter, merge_adapter
from semalign.models.decoder import find_decoder, logits, run_base
from semalign.models.loading import load_config, load_model, load_tokenizer
from semalign.models.partial import run_from
from semalign.models.published import SHAPES, absent, published_config
from semalign.models.vocabulary import vocabulary_overlap
from semalign.stages.costs import shape_of
from semalign.stages.inputs import load_inputs
from semalign.stages.job import Hyperparameters, ModelSpec, TrainJob
from semalign.stages.method_costs import delta_bytes, trained_parameters, translate_step
from semalign.stages.plan import make_plan
from semalign.stages.prepare import build_tail, save_result
from semalign.stages.student import StudentTail
from semalign.stages.training import train
from semalign.tasks import load_split
from tests.stages.conftest import make_store

CPU = torch.device("cpu")
TEACHER, STUDENT = zoo.path("zoo/teacher"), zoo.path("zoo/student")
ALL_NINE = (*Seeking().modules, "embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def rows() -> list[Tokens]:
    examples = load_split(zoo.path("zoo/data"), "mmlu", "extract")[:24]
    return tokenise(examples, load_tokenizer(STUDENT), max_length=256)


@pytest.fixture(scope="module")
def job(rows: list[Tokens], tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """Cross-entropy on every layer."""
    return TrainJob(
        student=ModelSpec(path=str(STUDENT), dtype="float32"),
        pairs=(),
        interfaces=("mlp",),
        adapter="lora",
        lora=Lora(rank=4),
        settings=Hyperparameters(
            epochs=2, lr=3e-3, batch_size=8, micro_batch_size=8, alpha=0.0, beta=1.0
        ),
        transport=None,
        teacher_store=None,
        prefix_store=None,
        layers=(0, 1, 2, 3),
    )


def prefixed(job: TrainJob, rows: list[Tokens], folder: Path) -> TrainJob:
    """One layer, its input from a store: the control on the same layer."""
    prefix = make_store(folder, STUDENT, rows, [Column(1, "input")], 128)
    return replace(job, layers=(1,), prefix_store=prefix)


def seeking(job: TrainJob, rows: list[Tokens], folder: Path, settings: Seeking) -> TrainJob:
    tokenizers = load_tokenizer(STUDENT), load_tokenizer(TEACHER)
    overlap = vocabulary_overlap(*tokenizers)
    shared = overlap.student_ids, overlap.teacher_ids
    seeds = translate(rows[:4], overlap.student_to_teacher)
    factors = seek(load_model(TEACHER), load_config(STUDENT), seeds, settings, shared)
    factors.save(folder / "factors.safetensors")
    return replace(job, factors=str(folder / "factors.safetensors"), seeking=settings)


Make = Callable[[TrainJob, list[Tokens], Path], TrainJob]
JOBS: dict[str, Make] = {
    "sft": prefixed,
    "sft, whole layer": lambda j, r, f: replace(prefixed(j, r, f), adapter="full"),
    "sft-all": lambda j, r, f: j,
    "sft-all, whole layers": lambda j, r, f: replace(j, adapter="full"),
    "seeking": lambda j, r, f: seeking(j, r, f, Seeking(rank=4)),
    "seeking, nine": lambda j, r, f: seeking(j, r, f, Seeking(rank=4, modules=ALL_NINE)),
    "seeking, block": lambda j, r, f: seeking(j, r, f, Seeking(rank=4, subtract="block")),
}


@torch.no_grad()
def answers(tail: StudentTail, rows: list[Tokens]) -> Tensor:
    """What the model in memory makes of the token after each prompt (rows, V)."""
    tail.eval()
    decoder = find_decoder(tail.model)
    hidden, mask, ids = tail._inputs(list(range(len(rows))), CPU)
    if hidden is None:
        final = run_base(decoder, ids, mask)
    else:
        final = run_from(decoder, tail.supervision.first_layer, hidden, mask)
    return logits(decoder, final[range(len(rows)), [row.prompt_length - 1 for row in rows]])


@torch.no_grad()
def reloaded(folder: Path, job: TrainJob, rows: list[Tokens]) -> Tensor:
    """The same of what was saved, by transformers and peft alone."""
    if (folder / "adapter").exists() and job.adapter == "full":
        merge_adapter(STUDENT, folder / "adapter", folder / "student")
    if (folder / "student").exists():
        model = load_model(folder / "student")
    else:
        model = load_adapter(load_model(STUDENT), folder / "adapter")
    ids, mask = pad(rows, 0)
    scores = model(input_ids=ids, attention_mask=mask).logits
    return scores[range(len(rows)), [row.prompt_length - 1 for row in rows]]


@pytest.mark.parametrize("name", JOBS)
def test_a_saved_result_answers_as_it_did(
    name: str, job: TrainJob, rows: list[Tokens], tmp_path: Path
) -> None:
    made = JOBS[name](job, rows, tmp_path)
    tail = build_tail(made, rows, CPU)
    untrained = answers(tail, rows)
    tail.train()
    train(tail, made.settings, on_epoch=lambda measured, save: None)
    trained = answers(tail, rows)
    assert (trained - untrained).abs().max() > 0.1
    save_result(tail.model, made, tmp_path / "saved")
    found = reloaded(tmp_path / "saved", made, rows)
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-3)
    assert torch.equal(found.argmax(dim=1), trained.argmax(dim=1))


def test_the_parameters_that_are_planned_are_trained(rows: list[Tokens], job: TrainJob) -> None:
    for method, made in (("sft", replace(job, layers=(0,))), ("sft-all", job)):
        config = planned(f"method={method}", "training.lora.rank=4")
        tail = build_tail(made, rows, CPU)
        count = sum(p.numel() for p in tail.parameters() if p.requires_grad)
        assert trained_parameters(config, load_inputs(config), len(made.layers)) == count


def test_a_student_that_the_losses_would_misread_is_refused(job: TrainJob, tmp_path: Path) -> None:
    shape = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = GraniteConfig(**shape, num_attention_heads=2, logits_scaling=4.0)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    student = ModelSpec(path=str(tmp_path), dtype="float32")
    for adapter in ("lora", "full"):
        made = replace(job, student=student, layers=(0,), adapter=adapter)
        with pytest.raises(UserError, match="the LM head does not turn"):
            build_tail(made, [], CPU)


@pytest.mark.parametrize("key", ["seeking.modules", "training.lora.target_modules"])
def test_no_module_at_all_is_refused_in_one_line(key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}=\[\]: .* at least 1 item") as caught:
        planned(f"{key}=[]")
    assert "\n" not in str(caught.value)


def test_laten_learns_from_labelled_rows_alone() -> None:
    config = planned("method=laten", "data.labelled_limit=3")
    inputs = load_inputs(config)
    train, align = labelled_rows(config, inputs.train, inputs.align)
    assert train == inputs.train[:3] and align == list(inputs.align)
    assert fingerprint(train) != fingerprint(inputs.train)  # and the key of the result with it
    config = planned("method=laten", "data.labelled_limit=3", "laten.align_split=train")
    inputs = load_inputs(config)
    train, align = labelled_rows(config, inputs.train, inputs.align)
    assert train == align == inputs.train[:3] and len(inputs.align) == 8


def test_latens_plan_counts_the_rows_that_are_there() -> None:
    def operations(*overrides: str) -> float:
        config = planned("method=laten", "laten.steps=2", *overrides)
        inputs = load_inputs(config)
        [step] = [s for s in make_plan(config, inputs, ()).steps if s.name == "translate"]
        assert step.gpus == 0.5
        return step.operations

    own = "laten.align_split=train", "extraction.num_gpus=0.5"
    few = operations(*own, "laten.pool=4", "data.labelled_limit=3")
    assert few == operations(*own, "data.labelled_limit=3")  # no 15 rows are there
    assert few < operations(*own)
    with pytest.raises(UserError, match=r"laten.steps=50: expected at most \d+, one for each row"):
        config = planned("method=laten", "laten.steps=50")
        make_plan(config, load_inputs(config), ())


def test_latens_saved_student_answers_as_the_hooked_one(rows: list[Tokens], tmp_path: Path) -> None:
    """The published code loses its deltas when it saves."""
    student, teacher = load_model(STUDENT), load_model(TEACHER)
    tokenizer = load_tokenizer(STUDENT)
    overlap = vocabulary_overlap(tokenizer, load_tokenizer(TEACHER))
    config = planned("method=laten", "laten.lr=0.01")
    made = laten.transfer(
        teacher,
        student,
        train=rows,
        attribution=rows[:4],
        align=rows,
        student_to_teacher=overlap.student_to_teacher,
        decode=lambda token: tokenizer.decode([token], skip_special_tokens=True),
        task="mmlu",
        settings=config.laten,
        seed=0,
    )
    laten.bake(STUDENT, made.deltas, tmp_path / "student")
    ids, mask = pad(rows, 0)
    where = range(len(rows)), [row.prompt_length - 1 for row in rows]
    with torch.no_grad():
        plain = student(input_ids=ids, attention_mask=mask).logits[where]
        with injected(find_decoder(student), made.deltas):
            hooked = student(input_ids=ids, attention_mask=mask).logits[where]
        baked = load_model(tmp_path / "student")
        found = baked(input_ids=ids, attention_mask=mask).logits[where]
    assert not torch.equal(hooked, plain)
    torch.testing.assert_close(found, hooked, rtol=1e-4, atol=1e-3)
    assert torch.equal(found.argmax(dim=1), hooked.argmax(dim=1))


def planned(*overrides: str) -> Config:
    return resolve([], ["data.train_limit=8", *overrides])


def llama2(method: str) -> Config:
    return planned(
        f"method={method}",
        "teacher=meta-llama/Llama-2-13b-chat-hf",
        "student=meta-llama/Llama-2-7b-chat-hf",
        "dtype=bfloat16",
    )


def test_the_published_shapes_have_the_published_sizes() -> None:
    weights = {name: shape_of(published_config(name)).weights for name in SHAPES}
    # all but the last norm
    assert weights["meta-llama/Llama-2-7b-chat-hf"] == 6_738_415_616 - 4096
    assert weights["meta-llama/Llama-2-13b-chat-hf"] == 13_015_864_320 - 5120
    assert weights["WizardLMTeam/WizardCoder-Python-13B-V1.0"] == 13_015_864_320 + 2 * 5120 - 5120
    assert not absent("zoo/student")


@pytest.mark.parametrize(
    ("method", "trained", "low", "high"),
    [
        ("semalign", 745_472, 26e9, 32e9),
        ("sft-all", 23_855_104, 13e9, 30e9),
        ("seeking", 39_976_960, 70e9, 90e9),
        ("laten", 188_743_680, 42e9, 50e9),
    ],
)
def test_13b_to_7b_is_planned_without_the_models(
    method: str, trained: int, low: float, high: float
) -> None:
    config = llama2(method)
    inputs = load_inputs(config, planned=True)
    plan = make_plan(config, inputs, None if config.pairs_layers else ())
    assert len(plan.absent) == 2
    assert plan.trained == trained
    largest = max(step.memory for step in plan.steps if step.name != "evaluate")
    assert low < largest < high


def test_latens_dense_deltas_are_avoided() -> None:
    """About 8 GB in float16 at 13B -> 7B, and twice that with gradients: ours are a tenth."""
    config = llama2("laten")
    inputs = load_inputs(config, planned=True)
    dense, sparse = delta_bytes(config, inputs, dense=True), delta_bytes(config, inputs)
    assert dense / 2 == pytest.approx(7.9e9, rel=0.01)
    assert sparse == 4 * 4096 * 96_576
    teacher, student = shape_of(inputs.teacher), shape_of(inputs.student)
    assert translate_step(config, inputs, teacher, student).disk == 4 * student.weights
