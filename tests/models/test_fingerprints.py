from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semalign.models import fingerprints
from semalign.models.fingerprints import (
    file_digest,
    model_fingerprint,
    serving_fingerprint,
    tokenizer_fingerprint,
)
from tests.models.architectures import save_checkpoint

VOCABULARY_FILES = [
    "bpe.codes",
    "entity_vocab.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "source.spm",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenization_own.py",
    "tokenizer.4.0.0.json",
    "tokenizer.model.v3",
    "vocab-src.json",
    "vocab.json",
    "vocab.txt",
]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files read as bytes, in order; the memory of this process is switched off."""
    names: list[str] = []
    real: Callable[..., Any] = Path.open

    def counting(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "rb":
            names.append(self.name)
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counting)
    afresh = fingerprints._file_digest.__wrapped__  # as in a new process
    monkeypatch.setattr(fingerprints, "_file_digest", afresh)
    return names


def edit_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def test_a_cached_model_is_read_once(copy: Path, cache: Path, opened: list[str]) -> None:
    first = model_fingerprint(copy, cache=cache), tokenizer_fingerprint(copy, cache=cache)
    assert sorted(opened) == ["model.safetensors", "tokenizer.json"]
    opened.clear()
    again = model_fingerprint(copy, cache=cache), tokenizer_fingerprint(copy, cache=cache)
    assert (again, opened) == (first, [])
    assert (model_fingerprint(copy), tokenizer_fingerprint(copy)) == first
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("what", ["content", "mtime", "inode"])
def test_a_changed_file_is_read_again(
    what: str, tmp_path: Path, cache: Path, opened: list[str]
) -> None:
    file = tmp_path / "data.bin"
    file.write_bytes(b"one")
    first, found = file_digest(file, cache=cache), file.stat()
    if what == "inode":  # a copy of equal size and time
        other = tmp_path / "other.bin"
        other.write_bytes(b"two")
        os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
        other.replace(file)
    elif what == "mtime":
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    else:
        file.write_bytes(b"longer")
    second = file_digest(file, cache=cache)
    assert opened == ["data.bin", "data.bin"]
    assert (second == first) == (what == "mtime")
    opened.clear()
    assert file_digest(file, cache=cache) == second and not opened


def test_memory_knows_the_inode(tmp_path: Path) -> None:
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"one")
    other.write_bytes(b"two")
    found = file.stat()
    first = file_digest(file)
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(file)
    assert file_digest(file) != first


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", "3", '{"sha256": 1}', '{"sha256": "ab"}', "\x00\xff"]
)
def test_a_damaged_entry_is_computed_again(damage: str, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"content")
    expected = file_digest(file, cache=cache)
    [entry] = cache.iterdir()
    whole = entry.read_text()
    entry.write_text(damage, encoding="latin-1")
    fingerprints._file_digest.cache_clear()
    assert file_digest(file, cache=cache) == expected
    assert entry.read_text() == whole


def test_an_entry_of_another_path_is_not_taken(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"content")
    expected = file_digest(file, cache=cache)
    [entry] = cache.iterdir()
    edit_json(entry, path="/elsewhere", sha256="0" * 64)
    fingerprints._file_digest.cache_clear()
    assert file_digest(file, cache=cache) == expected


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"content")
    assert file_digest(file, cache=file / "cache") == file_digest(file)  # its parent is a file
    (tmp_path / "cache").mkdir()
    fingerprints._file_digest.cache_clear()
    target = fingerprints.hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
    (tmp_path / "cache" / f"{target}.json").mkdir()  # cannot be replaced by a file
    assert file_digest(file, cache=tmp_path / "cache") == file_digest(file)
    assert [found.name for found in (tmp_path / "cache").iterdir()] == [f"{target}.json"]


def _digest_when_ready(file: Path, cache: Path, ready: Any, results: Any) -> None:
    ready.wait(60)
    results.put(file_digest(file, cache=cache))


def test_processes_at_the_same_time(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(1 << 20))
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(2), context.Queue()
    arguments = (file, cache, ready, results)
    workers = [context.Process(target=_digest_when_ready, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert found == {file_digest(file)}
    [entry] = cache.iterdir()
    assert json.loads(entry.read_text())["sha256"] == file_digest(file)


def all_of(folder: Path) -> tuple[str, str, str]:
    return model_fingerprint(folder), tokenizer_fingerprint(folder), serving_fingerprint(folder)


def which_differ(folder: Path, original: Path) -> list[bool]:
    pairs = zip(all_of(folder), all_of(original), strict=True)
    return [ours != theirs for ours, theirs in pairs]


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "additional_chat_templates/tool.jinja", "chat_template.json"]
)
def test_chat_template_files_change_what_is_served_alone(
    file: str, copy: Path, checkpoint: Path
) -> None:
    (copy / file).parent.mkdir(exist_ok=True)
    (copy / file).write_text(TEMPLATE)
    assert which_differ(copy, checkpoint) == [False, False, True]
    before = serving_fingerprint(copy)
    (copy / file).write_text(TEMPLATE + " ")
    assert serving_fingerprint(copy) != before


def test_a_chat_template_in_the_configuration_changes_what_is_served_alone(
    copy: Path, checkpoint: Path
) -> None:
    edit_json(copy / "tokenizer_config.json", chat_template=TEMPLATE)
    assert which_differ(copy, checkpoint) == [False, False, True]
    before = serving_fingerprint(copy)
    edit_json(copy / "tokenizer_config.json", chat_template=TEMPLATE + " ")
    assert serving_fingerprint(copy) != before


def test_stop_ids_change_what_is_served_alone(copy: Path, checkpoint: Path) -> None:
    assert json.loads((copy / "generation_config.json").read_text())["eos_token_id"] == 2
    edit_json(copy / "generation_config.json", temperature=0.5, eos_token_id=[2])
    assert which_differ(copy, checkpoint) == [False, False, False]
    edit_json(copy / "generation_config.json", eos_token_id=[2, 7])
    assert which_differ(copy, checkpoint) == [False, False, True]
    before = serving_fingerprint(copy)
    edit_json(copy / "generation_config.json", eos_token_id=[7, 2])
    assert serving_fingerprint(copy) == before
    (copy / "generation_config.json").unlink()
    assert which_differ(copy, checkpoint) == [False, False, True]


@pytest.mark.parametrize(
    "file",
    VOCABULARY_FILES,
)
def test_vocabulary_files_decide_token_ids(file: str, copy: Path, checkpoint: Path) -> None:
    (copy / file).write_text("{}")
    assert which_differ(copy, checkpoint) == [False, True, False]


def test_code_of_the_model_decides_what_it_computes(copy: Path, checkpoint: Path) -> None:
    (copy / "modeling_own.py").write_text("x = 1")
    assert which_differ(copy, checkpoint) == [True, False, False]


def test_every_file_transformers_reads_a_vocabulary_from_is_known(tmp_path: Path) -> None:
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    names = {name for name in TOKENIZER_MAPPING_NAMES.values() if isinstance(name, str)}
    files: set[str] = set()
    for name in sorted(names):
        found = getattr(getattr(transformers, name, None), "vocab_files_names", None)
        files |= {file for file in (found or {}).values() if isinstance(file, str)}
    assert len(files) > 10
    for file in files:
        (tmp_path / file).write_text("{}")
    known = fingerprints._matching(tmp_path, fingerprints.TOKENIZER_FILES)
    assert {found.name for found in known} == files
