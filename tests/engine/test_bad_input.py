"""Ten wrong configurations and files: one clear line each, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from semalign import cli
from semalign.artifacts.artifact import Workspace
from semalign.artifacts.local import make_all
from semalign.config.jobs import Config
from semalign.engine.executor import RayExecutor
from semalign.methods.method import Transfer
from semalign.stages.extraction import Activations

Complain = Callable[..., str]


@pytest.fixture(scope="session")
def family(family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same, with heads of a size that vLLM serves."""
    folders = {}
    for role, folder in family.items():
        folders[role] = tmp_path_factory.mktemp("served") / role
        shutil.copytree(folder, folders[role])
        config = LlamaConfig.from_pretrained(folder, head_dim=32)
        LlamaForCausalLM(config).save_pretrained(folders[role])
    return folders


@pytest.fixture
def complain(ray_cluster: None, configure: Callable[..., Config], capsys) -> Complain:  # type: ignore[no-untyped-def]
    """Run transfer.py's main with overrides; the one line it prints."""
    base = configure()

    def run(*overrides: str) -> str:
        given = [f"teacher={base.teacher}", f"student={base.student}", f"workdir={base.workdir}"]
        status = cli.main(["transfer", *given, *overrides])
        error = capsys.readouterr().err
        assert status == 2
        [line] = [x for x in error.splitlines() if x.startswith("error: ")]
        assert "Traceback" not in error
        return line

    return run


def test_unknown_key(complain: Complain) -> None:
    line = complain("pairing.stratgy=last")
    assert line == "error: pairing.stratgy: unknown key; did you mean 'pairing.strategy'?"


def test_missing_model_folder(complain: Complain) -> None:
    assert "model folder '/nowhere/model' does not exist" in complain("teacher=/nowhere/model")


def test_teacher_without_lm_head(
    complain: Complain, family: dict[str, Path], tmp_path: Path
) -> None:
    AutoModel.from_pretrained(family["teacher"]).save_pretrained(tmp_path / "headless")
    for file in family["teacher"].glob("tokenizer*"):
        (tmp_path / "headless" / file.name).write_bytes(file.read_bytes())
    line = complain(f"teacher={tmp_path / 'headless'}")
    assert "headless' is no complete causal language model: its checkpoint lacks lm_head" in line


def test_a_tokenizer_that_loses_its_text(
    complain: Complain, family: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    for file in family["teacher"].iterdir():
        if not file.name.startswith("tokenizer"):
            (folder / file.name).write_bytes(file.read_bytes())
    words = {f"word{i}": i for i in range(600)}
    foreign = Tokenizer(models.WordLevel(words, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=foreign, eos_token="word1").save_pretrained(folder)
    line = complain(f"teacher={folder}")
    assert "foreign': its tokenizer (tokenizer_class=" in line


def test_few_shared_tokens(complain: Complain, family: dict[str, Path], tmp_path: Path) -> None:
    """A tokenizer that keeps every text, with the single bytes in common and no word."""
    folder = tmp_path / "foreign"
    shutil.copytree(
        family["teacher"], folder, ignore=lambda _, names: {n for n in names if "token" in n}
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "<end>", *(f"word{i}" for i in range(640 - len(letters) - 1))]
    foreign = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    foreign.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=foreign, eos_token="<end>").save_pretrained(folder)
    line = complain(f"teacher={folder}")
    assert "alignment.min_overlap=0.9: only " in line and "of the smaller vocabulary" in line


def test_layer_out_of_range(complain: Complain) -> None:
    assert "extraction.layers: teacher layer 9 is out of range; expected 1..5" in complain(
        "extraction.layers=[9]"
    )


def test_empty_split(complain: Complain, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    row = json.dumps({"question": "1+1?", "answer": "1+1=2\n#### 2"}) + "\n"
    for split in ("extract", "dev", "test"):
        (folder / f"{split}.jsonl").write_text(row)
    (folder / "train.jsonl").write_text("")
    only = ("data.task=gsm8k", "evaluation.tasks=[gsm8k]")
    line = complain(f"data.root={tmp_path / 'data'}", *only)
    assert "gsm8k/train.jsonl: no rows" in line


def extracted(config: Config) -> Path:
    """The store of the teacher's targets, made."""
    prepared = Transfer.of(config)
    with RayExecutor(prepared.config, Workspace(config.work)) as executor:
        make_all(executor, prepared.first)
        recipe = prepared.recipe(executor.workspace)
        [stored] = [artifact for artifact in recipe.artifacts if type(artifact) is Activations]
        return executor.make(stored)


def test_corrupt_shard(complain: Complain, configure: Callable[..., Config]) -> None:
    config = configure()
    shard = sorted(extracted(config).rglob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    line = complain(
        "data.train_limit=96", "extraction.shard_examples=16", f"workdir={config.workdir}"
    )
    assert f"{shard}: shard is missing or damaged" in line


def test_wrong_dtype(complain: Complain, configure: Callable[..., Config]) -> None:
    assert "dtype='bfloat8': did you mean 'bfloat16'?" in complain("dtype=bfloat8")
    store = Path(configure().workdir) / "mine"
    overrides = ["data.train_limit=96", "extraction.shard_examples=16", f"extraction.store={store}"]
    assert extracted(configure(*overrides)) == store
    line = complain(*overrides, "extraction.dtype=float16")
    assert "does not fit the request (dtype: has bfloat16, wanted float16)" in line


def test_more_gpus_than_exist(complain: Complain) -> None:
    line = complain("extraction.num_gpus=64")
    assert line.startswith("error: extraction.num_actors=1: needs 64 GPUs, the cluster has 0")


def test_unwritable_output(complain: Complain) -> None:
    line = complain("workdir=/etc/hostname/work")
    assert "workdir=/etc/hostname/work: cannot be written (Not a directory)" in line


def test_a_process_ends_with_status_2_and_leaves_nothing(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "ray_jobs" / "transfer.py"
    done = subprocess.run(
        [sys.executable, str(script), "data.task=chess"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "error: data.task=chess: expected one of: gsm8k, humaneval, mbpp, mmlu"
    )
    assert list(tmp_path.iterdir()) == []
