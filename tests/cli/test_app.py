"""The command as people call it: help, errors, exit statuses, and how soon it answers."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from semalign import __version__
from semalign.cli import main
from semalign.config.describe import leaf_settings
from semalign.config.jobs import AnalysisJob, Config, EvaluationJob
from semalign.errors import Failed, UserError

ROOT = Path(__file__).parents[2]
JOBS = {"transfer": Config, "ablate": Config, "evaluate": EvaluationJob, "analyze": AnalysisJob}


def process(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "semalign", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("words", [["--help"], ["transfer", "--help"], ["ablate", "--help"]])
def test_help_answers_soon(words: list[str]) -> None:
    """Under 0.5 s of CPU on a quiet machine; what is measured here leaves room for a busy one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = process(*words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0 and "Usage: semalign" in done.stdout
    assert spent < 1.0


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from semalign.cli import main; main(['transfer', '--help'])\n"
        "heavy = {'torch', 'ray', 'transformers', 'mlflow', 'pyarrow', 'numpy', 'vllm', 'rich'}\n"
        "sys.exit(sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("job", JOBS)
def test_help_lists_every_setting(call: Any, job: str) -> None:
    text = " ".join(call(job, "--help").stdout.split())
    for setting in leaf_settings(JOBS[job]).values():
        assert f" {setting.name} {setting.type}" in text
        assert setting.description in text
    if job == "ablate":
        assert " scheduler.asha.grace_epochs whole number, at least 1 [default: 1]" in text


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    for words, error in (
        (["transfer", "lr=1e-3"], "lr: unknown key; did you mean 'training.lr'? There is also"),
        (["transfer", "nowhere.yaml"], "nowhere.yaml: does not exist; expected a YAML file or"),
        (["ablate", "sweeps/pairng.yaml"], "sweeps/pairng.yaml: does not exist"),
        (["ablate"], "expected one sweep file, e.g. sweeps/pairing.yaml; found none"),
        (["runs"], "workdir=work: does not exist; expected the folder of earlier runs"),
    ):
        done = process(*words, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {error}") and done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_what_ray_job_submit_runs_is_the_same(tmp_path: Path) -> None:
    for job in JOBS:
        done = subprocess.run(
            [sys.executable, str(ROOT / "ray_jobs" / f"{job}.py"), "nowhere/a.yaml"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: nowhere/a.yaml: does not exist; ")


def test_version_and_unknown_commands(call: Any) -> None:
    assert call("--version").stdout == f"semalign {__version__}\n"
    assert call("transfr").exit_code == 2
    assert call("transfer", "--pln").exit_code == 2
    assert call().exit_code == 2 and "Usage: semalign" in call().output


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a run and its plan were called with, in place of the engine."""
    calls: list[Any] = []

    def record(name: str) -> Any:
        def run(config: Any, **options: Any) -> None:
            print(f"running {name}")
            calls.append((name, config, options))
            if getattr(config, "seed", 0) == 1:
                raise Failed("the loss is NaN at step 3")
            if getattr(config, "seed", 0) == 2:
                raise UserError("extraction.num_gpus=64: needs 64 GPUs, the cluster has 0")

        return run

    modules = {
        "transfer": ["run_transfer"],
        "tuning": ["ablate"],
        "scoring": ["run_evaluation", "show_evaluation_plan"],
        "analysis": ["run_analysis", "show_analysis_plan"],
        "planning": ["show_plan", "show_sweep_plan"],
    }
    for module, names in modules.items():
        fake = SimpleNamespace(**{name: record(name) for name in names})
        monkeypatch.setitem(sys.modules, f"semalign.engine.{module}", fake)
    return calls


def test_each_job_runs_or_plans(call: Any, engine: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("loss.alpha: 0.3\nseed: 4\n")
    assert call("transfer", file, "loss.beta=0.5", "--plan", "seed=5").exit_code == 0
    name, config, _ = engine.pop()
    assert (name, config.loss.alpha, config.loss.beta, config.seed) == ("show_plan", 0.3, 0.5, 5)
    for words, expected in (
        (["transfer"], "run_transfer"),
        (["evaluate", "tasks=[mmlu]"], "run_evaluation"),
        (["evaluate", "--plan"], "show_evaluation_plan"),
        (["analyze", "figure=similarity"], "run_analysis"),
        (["analyze", "--plan"], "show_analysis_plan"),
    ):
        assert call(*words).exit_code == 0
        assert engine.pop()[0] == expected


def test_a_sweep_is_a_word_or_sweep_equals(call: Any, engine: list[Any]) -> None:
    for words in (["sweeps/smoke.yaml"], ["sweep=sweeps/smoke.yaml"], ["smoke"]):
        assert call("ablate", *words, "training.epochs=1", "sweep.seeds=[3]").exit_code == 0
        name, sweep, options = engine.pop()
        assert (name, sweep.name, sweep.seeds, options) == ("ablate", "smoke", (3,), {"yes": False})
        assert sweep.base["training.epochs"] == 1
    assert call("ablate", "smoke", "--plan", "--yes").exit_code == 0
    assert engine.pop()[0::2] == ("show_sweep_plan", {"yes": True})
    done = call("ablate", "smoke", "sweep=sweeps/pairing.yaml")
    assert done.exit_code == 2 and "found smoke, sweeps/pairing.yaml" in done.stderr


def test_exit_statuses(call: Any, engine: list[Any]) -> None:
    done = call("transfer", "seed=1")
    assert (done.exit_code, done.stderr) == (1, "error: the loss is NaN at step 3\n")
    done = call("transfer", "seed=2")
    assert done.exit_code == 2
    assert done.stderr == "error: extraction.num_gpus=64: needs 64 GPUs, the cluster has 0\n"
    assert main(["transfer", "seed=1"]) == 1
    assert main(["transfer", "seed=2"]) == 2
    assert main(["transfer"]) == 0


def test_quiet_and_verbose(call: Any, engine: list[Any]) -> None:
    assert call("transfer").stdout == "running run_transfer\n"
    done = call("-q", "transfer", "seed=1")
    assert (done.stdout, done.stderr) == ("", "error: the loss is NaN at step 3\n")
    done = call("-v", "transfer", "seed=1")
    assert "Traceback" in done.stderr and done.stderr.endswith("error: the loss is NaN at step 3\n")


def test_completion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")

    def complete(words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "semalign"],
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "_SEMALIGN_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            },
            capture_output=True,
            text=True,
        )
        return done.stdout.split()

    assert complete("semalign tran") == ["transfer"]
    assert complete("semalign transfer loss.al") == ["loss.alpha="]
    assert complete("semalign transfer extraction.interface=a") == ["extraction.interface=attn"]
    assert complete("semalign evaluate sampling.t") == ["sampling.temperature=", "sampling.top_p="]
    assert complete("semalign transfer mi") == ["mine.yaml"]
