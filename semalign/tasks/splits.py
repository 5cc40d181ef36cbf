"""Named splits: a file of one's own, the file that a benchmark was published as, or hub rows.

A published split is read whole or not at all: a file that lacks a row, or has one too many, would
give a score that looks like the benchmark's and is not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from semalign.config.sections import ROW_FILES
from semalign.errors import UserError, nearest
from semalign.tasks.profile import Published
from semalign.tasks.registry import find_task
from semalign.tasks.task import Example, Row, Task, parse_row, read_rows, to_json

HUB = Path("hub")  # as a root: the Hugging Face hub (a folder of that name is ./hub, made absolute)


def split_path(root: Path, task: str, split: str) -> Path:
    """The file that holds one split: the split where it is a file's path, the root where that is a
    file, ``<root>/<task>/<split>.jsonl``, ``.jsonl.gz`` or ``.parquet``, else the published file of
    all splits, such as ``<root>/mbpp/mbpp.jsonl``.

    Raises UserError with the nearest split there is.
    """
    if split.endswith(ROW_FILES):
        return Path(split)
    if Path(root).is_file():
        return Path(root)
    published = find_task(task).published
    folder = Path(root) / task
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected one holding {split}.jsonl; "
            f"{_listed(folder.parent)}"
        )
    found: dict[str, Path] = {}
    # Own splits come before those of the published file, plain files before compressed ones.
    paths = [path for suffix in ROW_FILES for path in folder.glob(f"*{suffix}") if path.is_file()]
    file = published.file if published else None
    for path in sorted(paths, key=lambda path: _stem(path) == file):
        held = published.splits if published and _stem(path) == file else [_stem(path)]
        found = dict.fromkeys(held, path) | found
    if split in found:
        return found[split]
    hint = nearest(split, found) if found else "the folder holds no .jsonl file"
    raise UserError(f"{folder}: no split '{split}'; {hint} {_listed(folder)}")


def _listed(folder: Path) -> str:
    """What a folder holds, for an error."""
    names = sorted(entry.name for entry in folder.glob("*"))
    return f"{folder} has {', '.join(names) or 'nothing'}"


def _named_file(task: Task, split: str) -> str:
    """The file, or the data set on the hub, that a task names for one of its splits."""
    if split not in task.files:
        raise UserError(f"task '{task.name}': no split '{split}'; {nearest(split, task.files)}")
    return task.files[split]


def _stem(path: Path) -> str:
    suffix = next((suffix for suffix in reversed(ROW_FILES) if path.name.endswith(suffix)), "")
    return path.name.removesuffix(suffix)


def split_source(root: Path, task: str, split: str) -> str:
    """Where a split comes from, to be recorded: a path, or ``hub:<id>:<configuration>:<split>``.

    Raises UserError when there is no such split.
    """
    if find_task(task).kind == "lm_eval":
        return find_task(task).source(root, split)
    if find_task(task).files and not split.endswith(ROW_FILES):
        return _named_file(find_task(task), split)
    if Path(root) != HUB or split.endswith(ROW_FILES):
        return str(split_path(root, task, split))
    published = _on_hub(find_task(task))
    if split not in published.splits:
        hint = nearest(split, published.splits)
        raise UserError(f"{task} on the hub: no split '{split}'; {hint}")
    return ":".join(("hub", *published.hub, split))


def load_split(root: Path, task: str, split: str) -> list[Example]:
    """All examples of one split, in the order of the file.

    ``root`` is a folder, or HUB for the Hugging Face hub. Raises UserError when the split is
    missing, empty or not whole, when a row is malformed and when an id is repeated.
    """
    found = find_task(task)
    if (examples := found.load(root, split)) is not None:
        return examples
    source = split_source(root, task, split)
    if source.startswith(f"{HUB}:"):
        examples = _examples(found, _hub_rows(found, source), source)
        if not found.files:
            _check_whole(examples, _on_hub(found).ids([split]), source)
        return examples
    examples = list(_read(found, Path(source), _state(Path(source))))
    published = found.published
    if published is None or _stem(Path(source)) != published.file:
        return examples
    _check_whole(examples, published.ids(list(published.splits)), source)
    wanted = set(published.ids([split]))
    return [example for example in examples if example.id in wanted]


def _state(file: Path) -> tuple[int, int, int]:
    """Changes when the file does."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@functools.lru_cache(maxsize=64)
def _read(task: Task, file: Path, state: tuple[int, int, int]) -> tuple[Example, ...]:
    """A sweep reads the same files for many transfers."""
    return tuple(_examples(task, read_rows(file, task), str(file)))


def _on_hub(task: Task) -> Published:
    """The published form of the task; UserError when it was not published."""
    if task.published is None:
        raise UserError(
            f"root=hub: task '{task.name}' is not on the hub; expected a folder that holds "
            f"{task.name}/<split>.jsonl"
        )
    return task.published


def _examples(task: Task, rows: Sequence[Row], source: str) -> list[Example]:
    examples = [task.example(row, index) for index, row in enumerate(rows)]
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise UserError(f"{source}: id '{example.id}' occurs twice; ids must be unique")
        seen.add(example.id)
    return examples


def _check_whole(examples: Sequence[Example], expected: Sequence[str], source: str) -> None:
    found = {example.id for example in examples}
    wrong = [f"'{id}' is missing" for id in expected if id not in found]
    wrong += [f"'{id}' is not one of them" for id in sorted(found.difference(expected))]
    if wrong:
        raise UserError(
            f"{source}: expected the {len(expected)} published rows, found {len(found)}: {wrong[0]}"
        )


def _hub_rows(task: Task, source: str) -> list[Row]:
    """The rows of a split on the hub, each held to the checks of a row in a file.

    Raises UserError when the hub cannot be reached and the split was not downloaded before.
    """
    import datasets

    name, *configuration, split = source.split(":")[1:]
    try:
        data = datasets.load_dataset(name, *configuration, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{source}: cannot be loaded ({reason}); go online without HF_HUB_OFFLINE, or name "
            f"a folder that holds {task.name}/{split}.jsonl"
        ) from error
    return [parse_row(to_json(row), f"{source}:{i}", task) for i, row in enumerate(data, 1)]
