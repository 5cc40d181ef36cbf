"""Whether the reference answers of a benchmark's rows pass the rows' own tests in the sandbox.

Where one fails, because its tests need a library or an object that the sandbox does not have, every
model's right answer fails with it.

    python -m semalign.stages.references <root> <task> ...    # runs them all, and prints the keys
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from semalign.config.sections import Evaluation, Sandbox
from semalign.data.root import data_root
from semalign.errors import UserError
from semalign.files import content_key, write_json
from semalign.sandbox.run import run
from semalign.stages.scoring import chosen_protocol
from semalign.tasks import Example, find_task, load_split, split_source
from semalign.tasks.profile import Profile

_PATIENCE_S = 60.0  # a busy machine is no fault of a row
_SHOWN = 3

# Splits whose references all pass: the published ones, then those of the zoo's data.
KNOWN = frozenset(
    (
        "daaf2ab80f1a70e8",  # HumanEval test: 164 rows
        "255723c555954303",  # MBPP prompt: 10
        "c0d47461560bb94e",  # MBPP test: 500
        "0cc0878755c4d04d",  # MBPP train: 374
        "cd27ea6b72f00732",  # MBPP validation: 90
        "5e250628299db224",  # zoo/data humaneval align: 128
        "e52af4bb3fe2453a",  # zoo/data humaneval dev: 200
        "5edd2a2c6fad0a3a",  # zoo/data humaneval extract: 32
        "745c212c9168fea5",  # zoo/data humaneval test: 400
        "d0928cfde3d3aaac",  # zoo/data humaneval train: 1000
        "9e42aa022dcc299d",  # zoo/data mbpp align: 128
        "a6b93dcfee11ad51",  # zoo/data mbpp dev: 200
        "59f2053c0872c965",  # zoo/data mbpp extract: 32
        "e0e4209e2092180f",  # zoo/data mbpp test: 400
        "77a19eb6ff2281aa",  # zoo/data mbpp train: 1000
    )
)


def references_key(examples: Sequence[Example]) -> str:
    """A hash of what decides whether the references of one task's rows pass."""
    task = examples[0].task
    own = [definition] if (definition := find_task(task).definition) else []
    return content_key("references", task, [example.row for example in examples], *own)


def failing(examples: Sequence[Example], profile: Profile, sandbox: Sandbox) -> dict[str, str]:
    """The error of each reference answer that fails its row's tests, by the row's id."""

    def error(example: Example) -> str:
        program = find_task(example.task).program(example.answer, example.row)
        limits = {"memory_mb": profile.memory_mb, "min_tier": sandbox.min_tier}
        verdict = run(program, timeout_s=_PATIENCE_S, **limits)
        return "" if verdict.passed else verdict.reason

    with ThreadPoolExecutor(sandbox.num_workers) as pool:
        errors = zip(examples, pool.map(error, examples), strict=True)
        return {example.id: found for example, found in errors if found}


def check_references(settings: Evaluation, root: Path, work: Path) -> None:
    """Raise UserError naming rows that would be scored and whose own reference fails their tests.

    Rows that have passed are noted in the work folder by their content, and not run again.
    """
    protocol = chosen_protocol(settings)
    for task, split in itertools.product(settings.tasks, settings.splits):
        if find_task(task).kind != "code":
            continue
        examples = load_split(root, task, split)
        if (key := references_key(examples)) in KNOWN:
            continue
        passed = work / "references" / f"{key}.json"
        if passed.exists():
            continue
        if errors := failing(examples, protocol.profile(task), settings.sandbox):
            more = f", the first {_SHOWN}" if len(errors) > _SHOWN else ""
            shown = "; ".join(f"{id}: {text}" for id, text in list(errors.items())[:_SHOWN])
            raise UserError(
                f"{split_source(root, task, split)}: the reference answers of {len(errors)} of "
                f"{len(examples)} rows fail their own tests in the sandbox{more} ({shown}); "
                "expected rows whose reference passes: mend them, or leave them out"
            )
        write_json(passed, {"rows": len(examples), "source": split_source(root, task, split)})


def main(root: str, tasks: Sequence[str]) -> None:
    """Run the references of every split, and print the keys of those that pass whole."""
    from semalign.tasks.protocols import find_protocol

    for task in tasks:
        published = find_task(task).published
        files = {path.name.split(".")[0] for path in (data_root(root) / task).glob("*.jsonl*")}
        whole = published is not None and published.file in files
        for split in sorted(published.splits if published and whole else files):
            examples = load_split(data_root(root), task, split)
            errors = failing(examples, find_protocol("paper").profile(task), Sandbox())
            where = f"{task} {split}"
            print(
                f'"{references_key(examples)}",  # {where}: {errors or len(examples)}', flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
