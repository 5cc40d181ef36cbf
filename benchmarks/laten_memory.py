"""LaTen's peak memory on top of the models: measured, and expected of sparse and of dense deltas.

    python benchmarks/laten_memory.py [teacher_width=1024] [student_width=768] [layers=8]

Random Llamas of these shapes, in float32 on the CPU; peak resident memory of the process during
`laten.transfer`, above what it held with both models loaded. Prints Markdown.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from semalign import zoo
from semalign.config.read import resolve
from semalign.data.dataset import Dataset
from semalign.data.tokens import tokenise
from semalign.methods.laten import transfer as laten
from semalign.methods.laten.method import LatenStudent
from semalign.models.loading import load_tokenizer
from semalign.models.memory import ADAM
from semalign.models.reference import Model
from semalign.models.vocabulary import shared_rows
from semalign.report.table import markdown
from semalign.stages.measure import peak_bytes
from semalign.tasks import load_split


def model(width: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def reference(random: LlamaForCausalLM) -> Model:
    """A model that lies in no folder: only its shape is looked at."""
    known = {"path": "", "weights": "", "tokens": "", "serving": ""}
    return Model(**known, dtype="float32", config=random.config)


def resident() -> int:
    """Bytes that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=") for argument in arguments)
    widths = int(given.get("teacher_width", 1024)), int(given.get("student_width", 768))
    layers = int(given.get("layers", 8))
    torch.set_num_threads(1)
    tokenizer = load_tokenizer("zoo/student")
    examples = load_split(zoo.path("zoo/data"), "mmlu", "align")[:32]
    rows = tokenise(examples, tokenizer, max_length=512)
    teacher, student = (model(width, layers, len(tokenizer)) for width in widths)
    with torch.no_grad():  # what a first forward pass allocates for good
        student(input_ids=torch.tensor([rows[0].ids]))
    before = resident()
    config = resolve([], ["method=laten", "laten.steps=2"])
    shared = shared_rows(len(tokenizer), len(tokenizer))
    planned = LatenStudent(
        task="mmlu",
        teacher=reference(teacher),
        student=reference(student),
        train=Dataset(rows),
        attribution=Dataset(rows[:4]),
        align=Dataset(rows),
        shared=shared,
        laten=config.laten,
        seed=0,
    )
    made = laten.translate_neurons(
        teacher,
        student,
        train=planned.train,
        attribution=planned.attribution,
        align=planned.align,
        student_to_teacher=shared.student_to_teacher,
        decode=lambda token: tokenizer.decode([token], skip_special_tokens=True),
        task=planned.task,
        settings=planned.laten,
        seed=planned.seed,
    )
    measured = peak_bytes("cpu") - before
    assert made.parameters == planned.trained_parameters
    optimizer = ADAM * made.parameters
    sparse, dense = (2 * planned.delta_bytes(dense=d) for d in (False, True))
    logits = 4 * 2**24  # held at a time while neurons are located
    body = [
        ["hypernetwork, gradients, AdamW", f"{optimizer / 1e6:.0f}"],
        ["deltas and gradients, sparse", f"{sparse / 1e6:.0f}"],
        ["deltas and gradients, dense", f"{dense / 1e6:.0f}"],
        ["logits, at most", f"{logits / 1e6:.0f}"],
        ["these with sparse deltas", f"{(optimizer + sparse + logits) / 1e6:.0f}"],
        ["these with dense deltas", f"{(optimizer + dense + logits) / 1e6:.0f}"],
        ["measured, activations too", f"{measured / 1e6:.0f}"],
    ]
    print(markdown([f"{widths[0]} -> {widths[1]}, {layers} layers", "MB"], body))


if __name__ == "__main__":
    main(sys.argv[1:])
