"""Layers of configuration, and the one line a mistake gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from semalign.config.dotted import flat
from semalign.config.jobs import Config
from semalign.config.read import resolve, resolve_with_sources
from semalign.config.sections import Sampling
from semalign.errors import UserError
from semalign.sweep.file import load_sweep
from semalign.sweep.trials import trials


def test_defaults_are_the_papers() -> None:
    config = resolve()
    assert config.training.batch_size == 64
    assert config.training.lora.rank == 16
    assert config.training.lora.scaling_alpha == 32
    assert set(config.training.lora.target_modules) == {"up_proj", "down_proj", "v_proj", "o_proj"}


def test_later_layers_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("loss: {alpha: 0.1, beta: 2}\nseed: 3\n")
    second.write_text("loss: {alpha: 0.2}\n")
    config = resolve([first, second], ["loss.beta=0.5", "training.lr=1e-3"])
    loss, training = config.loss, config.training
    assert (loss.alpha, loss.beta, config.seed, training.lr) == (0.2, 0.5, 3, 1e-3)


def test_workdir_becomes_absolute() -> None:
    assert Path(resolve([], ["workdir=here"]).workdir).is_absolute()


def test_folders_become_absolute_and_names_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's workers have working folders of their own."""
    monkeypatch.chdir(tmp_path)
    for folder in ("models/mine", "rows", "hub", "zoo/teacher"):
        (tmp_path / folder).mkdir(parents=True)
    config = resolve([], ["student=models/mine", "data.root=rows", "evaluation.root=hub"])
    assert config.student == str(tmp_path / "models" / "mine")
    assert config.data.root == str(tmp_path / "rows")
    assert (config.evaluation.root, config.teacher) == ("hub", "zoo/teacher")
    assert resolve([], ["teacher=org/model"]).teacher == "org/model"


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("los.alpha=1", "los.alpha: unknown key; did you mean 'loss.alpha'?"),
        ("los=1", "los: unknown key; did you mean 'loss'?"),
        ("lr=1e-3", "lr: unknown key; did you mean 'training.lr'? There is also laten.lr."),
        ("task=mmlu", "task: unknown key; did you mean 'data.task'?"),
        (
            "rnak=4",
            "rnak: unknown key; did you mean 'training.lora.rank'? There is also ",
        ),
        ("frequency=4", "frequency: unknown key; expected one of: alignment, attribution, "),
        ("loss.alpa=1", "loss.alpa: unknown key; did you mean 'loss.alpha'?"),
        ("loss.lr=1", "loss.lr: unknown key; did you mean 'training.lr'?"),
        ("evaluation.task=mmlu", "evaluation.task: unknown key; did you mean 'evaluation.tasks'?"),
        (
            "training.lora.rnk=1",
            "training.lora.rnk: unknown key; did you mean 'training.lora.rank'?",
        ),
        (
            "training.lroa.rank=1",
            "training.lroa.rank: unknown key; did you mean 'training.lora.rank",
        ),
        (
            "training={lora: {rnk: 1}}",
            "training.lora.rnk: unknown key; did you mean 'training.lora.",
        ),
        ("training.adapter=lor", "training.adapter='lor': did you mean 'lora'?"),
        ("data.label_noise=2", "data.label_noise=2"),
        ("loss.alpha=much", "loss.alpha='much': Input should be a valid number"),
        ("training.batch_size=0", "training.batch_size=0"),
        ("loss=3", "loss=3: expected a mapping of keys"),
        ("seed", "'seed': expected key=value"),
        ("seed={", "seed: '{' is not a YAML value"),
    ],
)
def test_mistakes_name_the_key(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        resolve([], [override])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mine.yml", "mine.yml: does not exist; did you mean 'mine.yaml'?"),
        ("sweeps/pairng.yaml", "sweeps/pairng.yaml: does not exist; did you mean 'sweeps/pairing."),
        ("sweps/pairing.yaml", "sweps/pairing.yaml: does not exist; did you mean 'sweeps/pairing."),
        ("pairing.yaml", "pairing.yaml: does not exist; did you mean 'sweeps/pairing.yaml'?"),
        ("lr", "lr: does not exist; expected a YAML file or key=value; YAML files in .: mine.yaml"),
        (
            "a/b/c.yaml",
            "a/b/c.yaml: does not exist; expected a YAML file or key=value; YAML files ",
        ),
        ("sweeps", "sweeps: cannot be read (Is a directory)"),
    ],
)
def test_a_file_that_does_not_exist(
    given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("mine.yaml", "sweeps/pairing.yaml", "sweeps/labels.yaml"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("seed: 1\n")
    for read in (lambda: resolve([given]), lambda: load_sweep(given)):
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value).startswith(message)


def test_dotted_and_nested_keys_mix_and_the_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "loss: {alpha: 0.1, beta: 2}\nloss.alpha: 0.3\ntraining: {lora.rank: 4, lora: {alpha: 7}}\n"
        "data.task: gsm8k\ndata: {train_limit: 9}\n"
    )
    config = resolve([file])
    assert (config.loss.alpha, config.loss.beta) == (0.3, 2)
    assert (config.training.lora.rank, config.training.lora.alpha) == (4, 7)
    assert (config.data.task, config.data.train_limit) == ("gsm8k", 9)
    file.write_text("loss.alpha: 0.3\nloss: {alpha: 0.1}\n")
    assert resolve([file]).loss.alpha == 0.1
    file.write_text("evaluation.sampling.n: 5\n")
    assert resolve([file], ["evaluation.sampling=null"]).evaluation.sampling is None
    assert resolve([], ["evaluation.sampling={}"]).evaluation.sampling == Sampling()


def test_dotted_keys_in_a_sweep(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "base: {data.task: mmlu}\nbase.loss: {alpha: 0, beta: 0.5}\naxes.loss.alpha: [0, 1]\n"
        "select: {metric: mmlu}\nselect.mode: min\n"
    )
    sweep = load_sweep(file)
    assert (sweep.select.metric, sweep.select.mode) == ("mmlu", "min")
    assert [axis.name for axis in sweep.axes] == ["loss.alpha"]
    assert (sweep.base["loss.alpha"], sweep.base["loss.beta"]) == (0, 0.5)


def test_mlflows_own_variables_are_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "")
    assert resolve().tracking_uri == "http://there:5000"
    assert resolve().tracking.experiment == "semalign"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    assert resolve().tracking.experiment == "ours"
    assert resolve([], ["tracking.experiment=mine"]).tracking.experiment == "mine"
    file = tmp_path / "a.yaml"
    file.write_text("base: {evaluation: {tasks: [mmlu]}}\naxes: {loss.alpha: [0, 1]}\n")
    assert {t.config.tracking.uri for t in trials(load_sweep(file))} == {"http://there:5000"}


def test_where_a_setting_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("loss: {alpha: 0.1, beta: 2}\nevaluation: {sampling: {n: 4}}\n")
    second.write_text("loss.alpha: 0.2\nevaluation: {sampling: null}\n")
    config, sources = resolve_with_sources([first, second], ["seed=3"])
    assert sources.keys() == flat(config.model_dump()).keys()
    given = {name: source for name, source in sources.items() if source != "default"}
    assert given == {
        "tracking.uri": "environment MLFLOW_TRACKING_URI",
        "loss.alpha": str(second),
        "loss.beta": str(first),
        "evaluation.sampling": str(second),
        "seed": "command line",
    }
