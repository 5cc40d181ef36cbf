"""`config`, `init`, `ls` and `env`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from semalign.cli.listing import REGISTRIES, description
from semalign.cli.shipped import find_sweep, shipped_sweeps
from semalign.config.describe import leaf_settings
from semalign.config.jobs import AnalysisJob, Config, EvaluationJob
from semalign.config.read import resolve
from semalign.core.pairing import STRATEGIES
from semalign.sweep.file import load_sweep
from semalign.sweep.trials import trials

SCHEMAS = {"transfer": Config, "evaluate": EvaluationJob, "analyze": AnalysisJob}


def test_config_says_where_each_setting_came_from(call: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("loss: {alpha: 0.3}\n")
    done = call("config", file, "training.lora.rank=4", f"workdir={tmp_path}")
    assert done.exit_code == 0
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"alpha: 0.3 # {file}" in lines
    assert "rank: 4 # command line" in lines
    assert "beta: 1.0 # default" in lines
    (tmp_path / "b.yaml").write_text(done.stdout)
    assert resolve([tmp_path / "b.yaml"]) == resolve(
        [file], ["training.lora.rank=4", f"workdir={tmp_path}"]
    )


@pytest.mark.parametrize("job", SCHEMAS)
def test_the_json_schema(call: Any, job: str) -> None:
    schema = json.loads(call("config", "--job", job, "--schema").stdout)
    assert schema == SCHEMAS[job].model_json_schema()
    assert schema["properties"]["dtype"]["description"]


@pytest.mark.parametrize("job", SCHEMAS)
def test_a_starter_file(call: Any, job: str, tmp_path: Path) -> None:
    """As it is it sets nothing; with every line taken in it sets the defaults."""
    file = tmp_path / "mine.yaml"
    assert call("init", job, file).exit_code == 0
    assert yaml.safe_load(file.read_text()) is None
    lines = [line for line in file.read_text().splitlines() if line.startswith("# ")]
    assert len(lines) == len(leaf_settings(SCHEMAS[job]))
    kept = [line[2:] for line in lines if "sampling." not in line]
    (tmp_path / "all.yaml").write_text("\n".join(kept))
    assert resolve([tmp_path / "all.yaml"], [], SCHEMAS[job]) == resolve([], [], SCHEMAS[job])
    for setting in leaf_settings(SCHEMAS[job]).values():
        assert setting.description in file.read_text().replace("\n## ", " ")


def test_a_starter_sweep(call: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    assert call("init", "sweep", file).exit_code == 0
    text = file.read_text()
    text = text.replace("# axes.loss.alpha:", "axes.loss.alpha:")
    text = text.replace("# base.data.train_limit: null", "base.data.train_limit: 8")
    file.write_text(text.replace("# select.mode: max", "select.mode: min"))
    sweep = load_sweep(file)
    assert (sweep.name, sweep.select.mode) == ("mine", "min")
    assert [trial.config.loss.alpha for trial in trials(sweep)] == [0, 0.1, 0.3]
    assert {trial.config.data.train_limit for trial in trials(sweep)} == {8}


def test_init_never_overwrites(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("init", "transfer")
    assert done.stdout == "transfer.yaml: semalign transfer transfer.yaml\n"
    Path("transfer.yaml").write_text("seed: 1\n")
    done = call("init", "transfer")
    assert done.exit_code == 2
    assert done.stderr == "error: transfer.yaml: exists already; name another file\n"
    assert Path("transfer.yaml").read_text() == "seed: 1\n"
    done = call("init", "sweep", "nowhere/sweep.yaml")
    assert done.exit_code == 2 and "nowhere/sweep.yaml: cannot be written" in done.stderr


def test_ls_lists_what_is_registered(call: Any) -> None:
    done = call("ls", "strategies", "protocols", "tasks", "models", "sweeps")
    assert done.exit_code == 0
    for name in (*STRATEGIES, "open-instruct", "humaneval", "zoo/teacher", "table1"):
        assert f" {name} " in done.stdout
    assert "the critical teacher layer itself" in done.stdout
    assert call("ls", "strategis").exit_code == 2


def test_ls_lists_what_is_added(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Toy(dict[str, Any]):
        pass

    def toy() -> None:
        """Pairs the first layers."""

    import semalign.core.pairing as pairing

    monkeypatch.setattr(pairing, "STRATEGIES", Toy({"toy": toy}))
    done = call("ls", "strategies")
    assert " toy " in done.stdout and "Pairs the first layers." in done.stdout


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_registry_is_listed(call: Any, kind: str) -> None:
    done = call("ls", kind)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{kind} ({REGISTRIES[kind][2]})")


def test_what_describes_a_thing() -> None:
    class Described:
        """Not this."""

        description = "This.\nNot that."

    class Documented:
        """This.

        Not that.
        """

    assert description("methods", Described()) == "This."
    assert description("methods", Documented()) == description("methods", Documented) == "This."


def test_shipped_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = shipped_sweeps()
    assert {"table1", "table2", "pairing"} <= shipped.keys()
    monkeypatch.chdir(tmp_path)
    for name in ("pairing", "pairing.yaml", "sweeps/pairing.yaml"):
        assert find_sweep(name) == shipped["pairing"]
    assert find_sweep("other/pairing.yaml") == Path("other/pairing.yaml")
    Path("pairing.yaml").write_text("base: {}\n")
    assert find_sweep("pairing.yaml") == Path("pairing.yaml")


def test_env(call: Any) -> None:
    done = call("env")
    assert done.exit_code == 0
    for word in ("semalign", "python", "torch", "ray", "vllm", "mlflow", "GPUs", "sandbox"):
        assert f" {word} " in done.stdout
