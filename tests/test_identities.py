"""The golden table: every setting changes the keys of what it decides, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from semalign.config.describe import leaf_settings, runtime_settings
from semalign.config.jobs import Config
from semalign.methods.method import effective
from semalign.sweep.file import load_sweep
from semalign.sweep.trials import trials
from tests.identities import (
    ARTIFACTS,
    COLUMNS,
    FILE,
    OTHERS,
    Measured,
    measure,
    table,
    trial_id,
)

# What decides whether, how much of, or on what it is run, but not the content of one artifact.
NO_ARTIFACT = {
    "extraction.layers",  # more columns of the same store
    "evaluation.tasks",  # more or fewer records
    "evaluation.splits",
}
ONLY_OF_THE_RUN = {("teacher", "sft-all")}  # which learns nothing from it


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure()


def test_every_setting_is_in_the_script() -> None:
    """A new one needs another value, so that what it changes can be seen."""
    settings = leaf_settings(Config)
    assert settings.keys() == OTHERS.keys()
    for name, setting in settings.items():
        assert OTHERS[name] != setting.default, name


def test_every_setting_has_an_effect_somewhere_or_is_runtime(measured: Measured) -> None:
    used = {change.setting for change in measured.changes if change.used}
    assert used | runtime_settings(Config) == leaf_settings(Config).keys()
    assert not used & runtime_settings(Config)


def test_what_has_no_effect_changes_nothing(measured: Measured) -> None:
    """Runtime settings, and those that the method, or another setting, makes idle."""
    found = [change for change in measured.changes if not change.used]
    assert {change.setting for change in found} >= runtime_settings(Config)
    assert {change for change in found if change.columns} == set()


def test_what_has_an_effect_changes_the_run_the_trial_and_an_artifact(measured: Measured) -> None:
    for change in measured.changes:
        if not change.used:
            continue
        assert {"run", "trial"} <= change.columns, change
        excused = change.setting in NO_ARTIFACT or (change.setting, change.base) in ONLY_OF_THE_RUN
        assert excused or change.columns & set(ARTIFACTS), change


def test_evaluation_decides_records_alone(measured: Measured) -> None:
    for name in leaf_settings(Config):
        if name.startswith("evaluation."):
            assert measured.columns(name) <= {
                "records", "records of the result", "run", "trial"
            }, name  # fmt: skip


def test_the_result_decides_its_records(measured: Measured) -> None:
    for change in measured.changes:
        if change.columns & {"training", "laten"}:
            assert "records of the result" in change.columns, change


def test_the_trials_of_a_sweep_have_the_ids_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    axes = "axes: {loss.alpha: [0.1, 0.3]}\nseeds: [0, 1]\n"
    file.write_text("base: {evaluation.tasks: [mmlu]}\n" + axes)
    made = trials(load_sweep(file))
    assert len({trial.id for trial in made}) == 4
    for trial in made:
        assert trial.id == trial_id(effective(trial.config))


def test_the_table_is_up_to_date(measured: Measured) -> None:
    assert FILE.read_text(encoding="utf-8") == table(measured), "run python -m tests.identities"
    assert f"| {' | '.join(COLUMNS)} |" in table(measured)
