"""The golden table: every setting changes the keys of what it decides, and no others."""

from __future__ import annotations

import pytest

from semalign.config.describe import leaf_settings, runtime_settings
from semalign.config.jobs import Config
from tests.identities import ARTIFACTS, COLUMNS, FILE, OTHERS, Measured, measure, table

# What decides whether, how much of, or on what it is run, but not the content of one artifact.
NO_ARTIFACT = {
    "extraction.layers",  # more columns of the same store
    "alignment.min_overlap",  # refuses a pair of models
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


def test_the_table_is_up_to_date(measured: Measured) -> None:
    assert FILE.read_text(encoding="utf-8") == table(measured), "run python -m tests.identities"
    assert f"| {' | '.join(COLUMNS)} |" in table(measured)
