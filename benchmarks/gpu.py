"""A transfer's stages on a GPU, at the shapes of Llama 2: seconds, tokens, memory, as Markdown.

    python benchmarks/gpu.py [--model 13b|7b|tiny] [--stages peak,bases,..] [--layers N] [--json F]

Teacher and student have random weights in bfloat16 and are run by the functions that a transfer
runs: `--model 13b` is 13B to 7B, `7b` is 7B to 7B, and `tiny` takes seconds on a CPU. Utilisation
(MFU) is the operations that a stage cannot do without, over the rate of a large matrix product in
the same run; the student's layers below the trained one are cached and not counted. A stage that
fails prints one line. Needs torch, transformers, peft and pydantic, but no Ray and no vLLM.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from semalign.artifacts.activations import ActivationStore, Column, Reader
from semalign.artifacts.artifact import Workspace
from semalign.config.sections import Alignment, Attribution, Extraction, Lora, Loss, Training
from semalign.core.alignment import recompose, semantic_coefficients
from semalign.core.bases import pseudoinverse, semantic_bases
from semalign.core.losses import chunked_sum, cross_entropy_sum, kl_divergence_sum
from semalign.core.pairing import Pair, paper_number
from semalign.data.dataset import Dataset
from semalign.data.tokens import Tokens
from semalign.models.decoder import capture, find_decoder, run_base
from semalign.models.loading import attention_implementation
from semalign.models.partial import drop_prefix, stopping_after
from semalign.models.published import published_config
from semalign.models.reference import Model
from semalign.models.vocabulary import Overlap, shared_rows
from semalign.report.table import markdown
from semalign.stages.adaptation import LoraAdaptation
from semalign.stages.attribution import LayerScores, attribution_scores
from semalign.stages.bases import Bases
from semalign.stages.extraction import Activations, Prefix, extract_shard
from semalign.stages.mapping import MAPS, Map, Transport, selected
from semalign.stages.student import CHUNK, SupervisedStudent
from semalign.stages.supervision import Supervision, Target
from semalign.stages.training import train
from semalign.stages.update import Update

Row = dict[str, Any]
GB, TERA = 1e9, 1e12
DTYPE = "bfloat16"
PATHS = {"7b": "meta-llama/Llama-2-7b-chat-hf", "13b": "codellama/CodeLlama-13b-Python-hf"}
TINY = {"vocab_size": 320, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and where. Layers count from 0; `examples` are those of a stage's batch."""

    teacher: Model
    student: Model
    device: torch.device
    length: int = 512
    answer: int = 128
    examples: int = 16
    most: int = 1024  # examples of the largest micro-batch that is tried
    repeats: int = 3
    square: int = 8192  # width of the product that the peak is measured with
    pinv: bool = False

    @property
    def layer(self) -> int:
        """The student's layer that is trained: in the middle."""
        return self.student.layers // 2

    @property
    def teacher_layer(self) -> int:
        """The teacher's layer at the same depth."""
        return self.teacher.layers * self.layer // self.student.layers


@dataclass
class Peak:
    """Rates of the device, measured at the start: operations and bytes a second."""

    operations: float | None = None
    bytes: float | None = None


@dataclass
class Run:
    """One run of the benchmark: its setting, the device's rates, and what has been measured."""

    setting: Setting
    peak: Peak = field(default_factory=Peak)
    found: dict[str, list[Row]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def rates(self, tokens: int, operations: float, seconds: float) -> Row:
        """The columns of a stage that runs a model on so many tokens."""
        rate = self.peak.operations
        return {
            "tokens": tokens,
            "seconds": seconds,
            "tokens/s": round(tokens / seconds),
            "TFLOP": operations / TERA,
            "MFU, %": None if rate is None else 100 * operations / seconds / rate,
        }


def reference(name: str, layers: int | None) -> Model:
    """A model of a published shape or a tiny one, with fewer layers if `layers` says so."""
    if name == "tiny":
        widths = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
        config = transformers.LlamaConfig(**TINY | widths)
    elif name == "tiny teacher":
        widths = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 6}
        config = transformers.LlamaConfig(**TINY | widths)
    else:
        config = published_config(PATHS[name])
    config.num_hidden_layers = layers or config.num_hidden_layers
    return Model(path=name, dtype=DTYPE, config=config, weights=name, tokens="", serving="")


def built(model: Model, device: torch.device, *, layers: int | None = None) -> nn.Module:
    """The model's first layers (None: all) with random weights, frozen as by `load_model`."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_hidden_layers = layers or config.num_hidden_layers
    with device:
        made = transformers.AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, DTYPE),
            attn_implementation=attention_implementation(config),
        )
    return made.eval().requires_grad_(False)


def head(model: Model, device: torch.device, *, seed: int) -> Tensor:
    """A random LM head (V, D) of the model's shape."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = model.shape.vocabulary, model.width
    made = torch.randn(shape, generator=generator, device=device) * 0.02
    return made.to(getattr(torch, DTYPE))


def examples(setting: Setting, count: int, *, mixed: bool) -> list[Tokens]:
    """Random tokens: all of the full length or, `mixed`, from half of it up to all of it.

    Lengths repeat after `setting.examples` of them.
    """
    generator = torch.Generator().manual_seed(0)
    most, period = setting.student.shape.vocabulary, setting.examples
    made = []
    for index in range(count):
        spared = (index % period) * (setting.length // 2) // period if mixed else 0
        length = setting.length - spared
        ids = torch.randint(3, most, (length,), generator=generator).tolist()
        made.append(Tokens(str(index), tuple(ids), length - min(setting.answer, length // 2)))
    return made


def stored(setting: Setting, width: int, tokens: Sequence[Tokens]) -> Reader:
    """Random stored rows of the examples; every `setting.examples` of them have the same."""
    period = setting.examples
    counts = [len(example.ids) for example in tokens]
    rows = torch.randn(sum(counts[:period]), width).to(getattr(torch, DTYPE))
    return Reader([rows] * -(-len(tokens) // period), counts, period)


def settled(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device, *, repeats: int, warm: int = 1) -> float:
    """Median seconds of `run`, by events on a GPU, after `warm` runs that do not count."""
    taken = []
    for index in range(warm + repeats):
        settled(device)
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds = float(begin.elapsed_time(end)) / 1000
        else:
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
        if index >= warm:
            taken.append(seconds)
    return statistics.median(taken)


def emptied(device: torch.device) -> None:
    """Give freed memory back, and begin to measure the peak anew."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """The most memory allocated since `emptied`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else None


def forward_operations(model: Model, layers: int, tokens: Sequence[Tokens]) -> float:
    """Of so many layers: their matrices, and the causal half of both products of attention."""
    shape = model.shape
    lengths = [len(example.ids) for example in tokens]
    attention = 2.0 * shape.attention * sum(n * n for n in lengths)
    return layers * (2.0 * shape.per_layer * sum(lengths) + attention)


def training_operations(setting: Setting, tokens: Sequence[Tokens], adapter: int) -> float:
    """Of a step: forward from the trained layer on, backward to the first of its adapters' inputs.

    In the trained layer's backward pass gate, up, down and output projections are gone through, of
    attention the product with its values alone; above it every matrix, and four products.
    `adapter`: its number of parameters, each in three products a token.
    """
    model, data = setting.student, Dataset(tokens)
    shape, above = model.shape, model.layers - setting.layer - 1
    squares = sum(len(example.ids) ** 2 for example in tokens)
    trained = 2.0 * data.length * (3 * shape.width * shape.intermediate)
    trained += 2.0 * data.length * shape.width * shape.attention + shape.attention * squares
    backward = above * (2.0 * shape.per_layer * data.length + 4.0 * shape.attention * squares)
    return (
        forward_operations(model, above + 1, tokens)
        + trained
        + backward
        + 6.0 * adapter * data.length
        + 4.0 * shape.head * data.supervised
        + 2.0 * model.width * setting.teacher.width * data.length
    )


def measure_peak(run: Run) -> list[Row]:
    """The rate of a square product in each dtype, of copies, and of writing to a file."""
    setting = run.setting
    device, n = setting.device, setting.square
    rows: list[Row] = []
    for name in (DTYPE, "float32", "float64"):
        left, right = (torch.randn(n, n, device=device).to(getattr(torch, name)) for _ in range(2))
        product = functools.partial(torch.matmul, left, right)
        seconds = timed(product, device, repeats=5, warm=3)
        rate = 2.0 * n**3 / seconds
        if name == DTYPE:
            run.peak.operations = rate
        rows.append({"measured": f"product {n} x {n}, {name}", "TFLOP/s": rate / TERA})
    source = torch.zeros(16 * n * n, device=device)
    target = torch.empty_like(source)
    run.peak.bytes = 2 * source.nbytes / timed(lambda: target.copy_(source), device, repeats=5)
    rows.append({"measured": "copy, read and written", "GB/s": run.peak.bytes / GB})
    page = torch.zeros(4 * n * n, dtype=torch.uint8)
    rate = page.nbytes / timed(lambda: page.to(device, copy=True), device, repeats=5)
    rows.append({"measured": "from ordinary memory to the device", "GB/s": rate / GB})
    with tempfile.TemporaryDirectory() as folder:

        def write() -> None:
            (Path(folder) / "rows").unlink(missing_ok=True)
            (Path(folder) / "rows").write_bytes(page.numpy())

        rate = page.nbytes / timed(write, device, repeats=5)
    rows.append({"measured": "to a new file", "GB/s": rate / GB})
    return rows


def in_float32(weight: Tensor) -> Tensor:
    """Semantic bases (D, V) with the Gram matrix, its factor and the last product in float32."""
    wide = weight.float()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide.T @ wide))
    return F.normalize(inverse @ wide.T, dim=0, eps=1e-30)


def measure_bases(run: Run) -> list[Row]:
    """Semantic bases by the product's function, against other ways to compute them."""
    setting = run.setting
    device, rows = setting.device, list[Row]()
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "semantic_bases": semantic_bases,
        "all in float32": in_float32,
        "Gram in float32": lambda w: w.float().T @ w.float(),
        "Gram in float64": lambda w: w.double().T @ w.double(),
    }
    if setting.pinv:
        ways["torch.linalg.pinv"] = lambda w: F.normalize(torch.linalg.pinv(w.float()), dim=0)
    for model in {m.width: m for m in (setting.student, setting.teacher)}.values():
        weight, first = head(model, device, seed=0), len(rows)
        for name, way in ways.items():
            emptied(device)
            repeats, warm = (1, 0) if name == "torch.linalg.pinv" else (setting.repeats, 1)
            run_way = functools.partial(way, weight)
            row: Row = {"head": f"{len(weight)} x {model.width}", "way": name}
            row["seconds"] = timed(run_way, device, repeats=repeats, warm=warm)
            rows.append(row | {"1 - cosine, worst": None, "peak, GB": peak_gb(device)})
        rows[first]["planned, GB"] = Bases(model=model).cost().memory / GB
        exact = F.normalize(pseudoinverse(weight.double()), dim=0, eps=1e-30)
        for row in rows[first : first + 2]:
            # 1 - cos of unit vectors is |difference|^2 / 2: no digits are lost
            difference = ways[row["way"]](weight) - exact
            row["1 - cosine, worst"] = difference.square().sum(dim=0).max().item() / 2
        del exact, difference  # or the next head's peaks would hold them
    return rows


def overlap(setting: Setting) -> Overlap:
    return shared_rows(setting.student.shape.vocabulary, setting.teacher.shape.vocabulary)


def measure_map(run: Run) -> list[Row]:
    """The map from bases in main memory, as `Map.make` has them, and its use on a batch."""
    setting = run.setting
    device, shared = setting.device, overlap(setting)
    sides = (setting.student, shared.student_ids), (setting.teacher, shared.teacher_ids)
    bases = [semantic_bases(head(model, device, seed=0)).cpu() for model, _ in sides]
    kind, repeats = MAPS.find("cosine"), setting.repeats

    def gathered() -> list[Tensor]:
        both = zip(bases, sides, strict=True)
        return [selected(whole.to(device), 1, ids) for whole, (_, ids) in both]

    student, teacher = gathered()
    transport = Transport.build(student, teacher, kind)
    hidden = torch.randn(setting.examples * setting.length, setting.teacher.width, device=device)
    hidden = hidden.to(getattr(torch, DTYPE))
    few = hidden[: min(len(hidden), 1024)]
    naive = recompose(semantic_coefficients(few.double(), teacher.double()), student.double())
    error = 1 - F.cosine_similarity(transport(few).double(), naive, dim=-1)
    product = 2.0 * len(shared.student_ids) * setting.student.width * setting.teacher.width
    applied = 2.0 * len(hidden) * setting.student.width * setting.teacher.width
    parts: list[tuple[str, Callable[[], object], float | None]] = [
        ("shared columns to the device", gathered, None),
        ("matrix", lambda: Transport.build(student, teacher, kind), product),
        (f"applied to {len(hidden)} rows", lambda: transport(hidden), applied),
    ]
    rows = []
    for name, part, operations in parts:
        seconds = timed(part, device, repeats=repeats)
        rate = None if operations is None else operations / seconds / TERA
        rows.append({"part": name, "seconds": seconds, "TFLOP/s": rate})
    return [*rows, {"part": "1 - cosine to Eq. 1 and 2, worst", "value": error.max().item()}]


def measure_extraction(run: Run) -> list[Row]:
    """The teacher's and the student's passes up to the layers that a training needs."""
    setting, rows = run.setting, []
    cases: list[tuple[type[Activations], Model, Column]] = [
        (Activations, setting.teacher, Column(setting.teacher_layer, "mlp")),
        (Prefix, setting.student, Column(setting.layer, "input")),
    ]
    for kind, reference_, column in cases:
        emptied(setting.device)
        model = built(reference_, setting.device, layers=column.layer + 1)
        for mixed in (False, True):
            rows += _extracted(run, kind, reference_, model, column, mixed)
        del model
    return rows


def _extracted(
    run: Run, kind: type[Activations], reference_: Model, model: nn.Module, column: Column,
    mixed: bool,
) -> list[Row]:  # fmt: skip
    """A pass alone, and all of `extract_shard`: batches, copies to main memory, the file."""
    setting, settings = run.setting, Extraction(shard_examples=run.setting.examples)
    device, decoder = setting.device, find_decoder(model)
    tokens = examples(setting, setting.examples, mixed=mixed)
    # what the layers below a layer's input compute is all that it needs
    depth = column.layer + (column.interface != "input")
    operations = forward_operations(reference_, depth, tokens)
    ids = torch.zeros((len(tokens), setting.length), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(tokens):
        mask[row, : len(example.ids)] = 1
    wanted = [(column.layer, column.interface)]

    def alone(*, masked: bool) -> None:
        per_pass = max(1, settings.batch_tokens // setting.length)
        with (
            torch.inference_mode(),
            stopping_after(decoder, depth - 1),
            capture(decoder, wanted),
        ):
            for part, given in zip(ids.split(per_pass), mask.split(per_pass), strict=True):
                if masked:
                    run_base(decoder, part, given)
                else:
                    decoder.base(input_ids=part, use_cache=False)

    data = Dataset(tokens)
    artifact = kind(
        model=reference_, rows=data, columns=frozenset({column}), positions="all",
        dtype=DTYPE, extraction=settings,
    )  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()

        def whole() -> None:
            store = ActivationStore(
                Path(folder) / str(next(numbers)),  # to replace a file takes longer
                {}, examples=len(tokens), positions="all", dtype=DTYPE, shard_examples=len(tokens),
            )  # fmt: skip
            extract_shard(model, store, 0, [column], tokens, batch_tokens=settings.batch_tokens)

        parts: dict[str, Callable[[], object]] = {
            "forward passes": functools.partial(alone, masked=True),
            "forward passes, no mask": functools.partial(alone, masked=False),
            "extract_shard": whole,
        }
        for name, part in parts.items():
            emptied(device)
            seconds = timed(part, device, repeats=setting.repeats)
            rows.append(
                {
                    "model": f"{reference_.path}, {column.interface} {paper_number(column.layer)}",
                    "lengths": "mixed" if mixed else "equal",
                    "part": name,
                    **run.rates(data.length, operations, seconds),
                    "peak, GB": peak_gb(device),
                    "planned, GB": artifact.cost().memory / GB,
                }
            )
    return rows


def planned_update(setting: Setting, tokens: Sequence[Tokens], micro: int) -> Update:
    """The training as an artifact, of which the plan is asked."""
    rows = Dataset(tokens)
    layer, pair = setting.layer, Pair((setting.teacher_layer,), (1.0,), setting.layer)
    common: dict[str, Any] = {
        "rows": rows, "positions": "all", "dtype": DTYPE, "extraction": Extraction(),
    }  # fmt: skip
    return Update(
        name="benchmark",
        student=setting.student,
        rows=rows,
        labelled=None,
        adaptation=LoraAdaptation((layer,), Lora(), 0),
        loss=Loss(),
        training=Training(epochs=1, lr=3e-4, batch_size=len(tokens), micro_batch_size=micro),
        extraction=Extraction(),
        seed=0,
        pairs=(pair,),
        prefix=Prefix(
            model=setting.student, columns=frozenset({Column(layer, "input")}), **common
        ),
        teacher=setting.teacher,
        targets=Activations(
            model=setting.teacher, columns=frozenset({Column(pair.teacher[0], "mlp")}), **common
        ),
        map=Map(
            student=setting.student, teacher=setting.teacher, shared=overlap(setting),
            alignment=Alignment(),
        ),
    )  # fmt: skip


def adapted(setting: Setting) -> nn.Module:
    """The student with a LoRA on its trained layer, without what lies below it."""
    adaptation = LoraAdaptation((setting.layer,), Lora(), 0)
    model = adaptation.apply(built(setting.student, setting.device), Workspace(Path()))
    drop_prefix(find_decoder(model), setting.layer)
    return model.to(setting.device)


def supervised(setting: Setting, model: nn.Module, tokens: Sequence[Tokens]) -> SupervisedStudent:
    """The student with random targets and inputs at hand, in main memory as a store has them."""
    widths = setting.student.width, setting.teacher.width
    reader = stored(setting, widths[1], tokens)
    supervision = Supervision(
        tokens=tokens,
        loss=Loss(),
        positions="all",
        first_layer=setting.layer,
        inputs=stored(setting, widths[0], tokens),
        targets=[Target(setting.layer, "mlp", (reader,), (1.0,))],
        transport=Transport(torch.randn(*widths, device=setting.device)),
    )
    return SupervisedStudent(model, supervision)


def stepped(setting: Setting, student: SupervisedStudent, micro: int, steps: int) -> float:
    """Seconds of an optimizer step by the training's own loop, of an epoch that has so many."""
    ends: list[float] = []

    def on_epoch(*_: object) -> None:
        settled(setting.device)
        ends.append(time.perf_counter())

    count = len(student.supervision.tokens) // steps
    # the first epoch warms up, and its end is the begin of the second
    settings = Training(epochs=2, lr=1e-5, batch_size=count, micro_batch_size=micro)
    train(student, settings, 0, on_epoch=on_epoch)
    return (ends[1] - ends[0]) / steps


def fed(setting: Setting, student: SupervisedStudent, micro: int, count: int) -> float:
    """Median seconds in which so many examples' stored rows come to the device, none ahead."""
    targets = student.supervision.targets

    def copies() -> None:
        for start in range(0, count, micro):
            batch = student.micro_batch(list(range(start, min(start + micro, count))))
            batch.hidden(getattr(torch, DTYPE))
            for target, rows in zip(targets, batch.targets, strict=True):
                target.mixed(rows)

    return timed(copies, setting.device, repeats=setting.repeats)


def measure_training(run: Run) -> list[Row]:
    """Steps of one layer's update in micro-batches of twice the size, until memory is out."""
    setting, rows, largest = run.setting, list[Row](), 0
    emptied(setting.device)
    model = adapted(setting)
    micro = 1
    while micro <= setting.most:
        row = _trained(run, model, micro, mixed=False)
        if row is None:
            rows.append({"micro-batch": micro, "lengths": "equal", "seconds": "out of memory"})
            break
        rows.append(row)
        micro, largest = 2 * micro, micro
    if largest and (row := _trained(run, model, max(1, largest // 2), mixed=True)):
        rows.append(row)
    return rows


def _trained(run: Run, model: nn.Module, micro: int, *, mixed: bool) -> Row | None:
    """One row of the table; None where the device's memory does not do."""
    setting = run.setting
    count, steps = max(micro, setting.examples), 2 * setting.repeats
    tokens = examples(setting, count, mixed=mixed)
    update = planned_update(setting, tokens, micro)
    operations = training_operations(setting, tokens, update.trained_parameters)
    student = supervised(setting, model, examples(setting, steps * count, mixed=mixed))
    emptied(setting.device)
    try:
        seconds = stepped(setting, student, micro, steps)
    except torch.OutOfMemoryError:
        seconds = None
    if seconds is None:  # here the exception's frames, and what they hold, are gone
        model.zero_grad(set_to_none=True)
        emptied(setting.device)
        return None
    return {
        "micro-batch": micro,
        "lengths": "mixed" if mixed else "equal",
        **run.rates(Dataset(tokens).length, operations, seconds),
        "peak, GB": peak_gb(setting.device),
        "planned, GB": update.cost().memory / GB,
        "copies if none were ahead, % of time": 100 * fed(setting, student, micro, count) / seconds,
    }


def measure_losses(run: Run) -> list[Row]:
    """Terms at the output with their backward pass, whole and in chunks of rows."""
    setting, device = run.setting, run.setting.device
    weight = head(setting.student, device, seed=0)
    count = setting.examples * setting.length
    hidden = torch.randn(count, setting.student.width, device=device).to(weight.dtype)
    hidden.requires_grad_(True)
    other = torch.randn_like(hidden).detach()
    labels = torch.randint(0, len(weight), (count, 1), device=device).float()  # exact up to 2^24

    def cross_entropy(h: Tensor, y: Tensor) -> Tensor:
        return cross_entropy_sum(F.linear(h, weight), y[:, 0].long())

    def divergence(h: Tensor, t: Tensor) -> Tensor:
        return kl_divergence_sum(F.linear(h, weight), F.linear(t, weight))

    cases = [("cross-entropy", cross_entropy, labels), ("divergence", divergence, other)]
    rows: list[Row] = []
    for name, part, given in cases:
        for chunk in (None, CHUNK, 8 * CHUNK):

            def step(part: Any = part, given: Tensor = given, chunk: int | None = chunk) -> None:
                summed = part(hidden, given) if chunk is None else None
                if summed is None:
                    summed = chunked_sum(part, hidden, given, chunk=chunk or 1)
                summed.backward()
                hidden.grad = None

            emptied(device)
            row: Row = {"term": name, "rows": count, "chunk": chunk or "whole"}
            try:
                row["seconds"] = timed(step, device, repeats=setting.repeats)
            except torch.OutOfMemoryError:
                row["seconds"] = "out of memory"
            rows.append(row | {"peak, GB": peak_gb(device)})
    return rows


def measure_waits(run: Run) -> list[Row]:
    """The lines in which the host waits for the device, in one step of two micro-batches."""
    setting = run.setting
    if setting.device.type != "cuda":
        raise RuntimeError("only a GPU is waited for")
    small = replace(setting, student=reference(setting.student.path, 2))
    student = supervised(small, adapted(small), examples(small, small.examples, mixed=True))
    settings = Training(epochs=1, lr=1e-5, batch_size=64, micro_batch_size=small.examples // 2)
    train(student, settings, 0, on_epoch=lambda *_: None)  # the first allocates
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(student, settings, 0, on_epoch=lambda *_: None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = collections.Counter(
        f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}"
        for w in seen
        if "synchronizing" in str(w.message)
    )
    return [{"line": line, "waits": count} for line, count in lines.most_common()]


def measure_attribution(run: Run) -> list[Row]:
    """Gradient x activation of all of the teacher's layers; needs captum."""
    setting, settings = run.setting, Attribution()
    model = built(setting.teacher, setting.device)
    tokens = examples(setting, setting.examples, mixed=False)
    operations = 2 * forward_operations(setting.teacher, setting.teacher.layers, tokens)
    operations += 4.0 * setting.teacher.shape.head * Dataset(tokens).supervised
    rows = []
    for size in (settings.batch_size // 4, settings.batch_size):
        emptied(setting.device)
        planned = LayerScores(
            model=setting.teacher, rows=Dataset(tokens), settings=Attribution(batch_size=size)
        )

        def scores(size: int = size) -> None:
            attribution_scores(
                model, tokens, granularity=settings.granularity,
                aggregation=settings.aggregation, batch_size=size,
            )  # fmt: skip

        row: Row = {"batch": size}
        try:
            seconds = timed(scores, setting.device, repeats=1)
            row |= run.rates(Dataset(tokens).length, operations, seconds)
        except torch.OutOfMemoryError:
            row["seconds"] = "out of memory"
        row |= {"peak, GB": peak_gb(setting.device), "planned, GB": planned.cost().memory / GB}
        rows.append(row)
    return rows


STAGES: dict[str, Callable[[Run], list[Row]]] = {
    "peak": measure_peak,
    "bases": measure_bases,
    "map": measure_map,
    "extraction": measure_extraction,
    "losses": measure_losses,
    "training": measure_training,
    "waits": measure_waits,
    "attribution": measure_attribution,
}


def cell(value: Any) -> str:
    """A number for people."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row]) -> str:
    """Markdown with every column that some row has."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    return markdown(head, [[cell(row.get(name)) for name in head] for row in rows])


def measure(run: Run, stages: Sequence[str]) -> None:
    """Measure the stages one after the other, and print each as it is done."""
    for name in stages:
        begin = time.monotonic()
        try:
            run.found[name] = STAGES[name](run)
        except Exception as error:
            found = str(error).strip().split("\n")[0]
            run.failed[name] = f"{type(error).__name__}: {found}"
        emptied(run.setting.device)
        took = f"{time.monotonic() - begin:.0f} s"
        if name in run.failed:
            print(f"{name} failed after {took}: {run.failed[name]}\n", flush=True)
        else:
            print(f"## {name} ({took})\n\n{table(run.found[name])}", flush=True)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=("13b", "7b", "tiny"), default="13b", help="teacher")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of the stages, by comma")
    parser.add_argument("--layers", type=int, help="layers of both models (default: all)")
    parser.add_argument("--length", type=int, help="tokens of an example")
    parser.add_argument("--answer", type=int, help="tokens of an example that are its answer")
    parser.add_argument("--examples", type=int, help="examples of a batch")
    parser.add_argument("--most", type=int, help="examples of the largest micro-batch")
    parser.add_argument("--memory", type=float, help="GB of the device that may be used")
    parser.add_argument("--pinv", action="store_true", help="time torch.linalg.pinv too")
    parser.add_argument("--device", default=default)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.stages.split(",")) - STAGES.keys():
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    return chosen


def setting_of(chosen: argparse.Namespace) -> Setting:
    """The models and sizes that the options name; tiny ones have small defaults."""
    tiny = chosen.model == "tiny"
    teacher, student = ("tiny teacher", "tiny") if tiny else (chosen.model, "7b")
    sizes: dict[str, Any] = {"length": 32, "answer": 8, "examples": 4} if tiny else {}
    sizes |= {"most": 4, "repeats": 1, "square": 128} if tiny else {}
    given = {name: getattr(chosen, name) for name in ("length", "answer", "examples", "most")}
    return Setting(
        teacher=reference(teacher, chosen.layers),
        student=reference(student, chosen.layers),
        device=torch.device(chosen.device),
        pinv=chosen.pinv,
        **sizes | {name: value for name, value in given.items() if value is not None},
    )


def main(arguments: Sequence[str] | None = None) -> Run:
    chosen = options(arguments)
    setting = setting_of(chosen)
    device, cuda = setting.device, setting.device.type == "cuda"
    if cuda and chosen.memory:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, chosen.memory * GB / whole), device)
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    about = {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "teacher": f"{setting.teacher.path}, {setting.teacher.layers} layers",
        "student": f"{setting.student.path}, {setting.student.layers} layers",
        "trained layer": paper_number(setting.layer),
        "length": setting.length,
        "answer": setting.answer,
    }
    print("; ".join(f"{key} {value}" for key, value in about.items()) + "\n", flush=True)
    run = Run(setting)
    measure(run, chosen.stages.split(","))
    if chosen.json:
        content = {"about": about, "stages": run.found, "failed": run.failed}
        chosen.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return run


if __name__ == "__main__":
    main()
