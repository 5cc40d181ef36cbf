"""A method of one's own in one file: cross-entropy on the last layer alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from semalign import register_method
from semalign.config.jobs import Config
from semalign.core.pairing import Pair
from semalign.methods.controls import SftAll
from semalign.methods.inputs import Inputs
from semalign.methods.method import Recipe
from semalign.stages.adaptation import adaptation
from semalign.stages.update import Update
from tests.extending.check import listed, made, planned, swept


class LastLayer(SftAll):
    """Cross-entropy on the student's last layer."""

    def unused(self, config: Config) -> Mapping[str, str]:
        return {**super().unused(config), "data.max_length": f"method={config.method}"}

    def recipe(self, config: Config, inputs: Inputs, pairs: tuple[Pair, ...]) -> Recipe:
        [update] = super().recipe(config, inputs, pairs).artifacts
        assert isinstance(update, Update)
        training, last = config.training, [inputs.student.layers - 1]
        adapted = adaptation(training.adapter, last, training.lora, config.seed)
        values = {name: getattr(update, name) for name in update.__dataclass_fields__}
        return Recipe(pairs=(), artifacts=(Update(**{**values, "adaptation": adapted}),))


if __name__ == Path(__file__).stem:  # as a plugin
    register_method("last-layer", LastLayer())


def test_it_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Cross-entropy on the student's last layer." in listed("methods", __file__, capsys)


def test_it_is_planned_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "method last-layer" in planned(__file__, "method=last-layer", capsys=capsys)
    manifest = made(tmp_path, __file__, "method=last-layer")
    assert manifest["name"] == "mmlu-last-layer" and manifest["result"] == "adapter"
    assert made(tmp_path, __file__, "method=last-layer")["made"] == manifest["made"]  # found again


def test_it_is_swept(tmp_path: Path) -> None:
    assert swept(tmp_path, __file__, "method: [sft, last-layer]") == 3  # and the base
