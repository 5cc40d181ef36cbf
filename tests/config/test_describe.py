"""Every setting is described, and docs/settings.md says the same."""

from __future__ import annotations

import pickle

import pytest
import yaml
from pydantic import BaseModel

from semalign.config.describe import (
    given_settings,
    leaf_settings,
    runtime_settings,
    yaml_text,
)
from semalign.config.dotted import flat, lookup, nested
from semalign.config.jobs import AnalysisJob, Config, EvaluationJob
from semalign.config.read import resolve, validate
from semalign.config.reference import FILE, reference
from semalign.sweep.file import Sweep

JOBS = (Config, EvaluationJob, AnalysisJob)


@pytest.mark.parametrize("schema", [*JOBS, Sweep])
def test_every_setting_has_one_sentence(schema: type[BaseModel]) -> None:
    for setting in leaf_settings(schema).values():
        assert setting.description.endswith("."), setting.name
        assert setting.description[0].isupper(), setting.name
        assert ". " not in setting.description.replace("Eq. ", ""), setting.name
        if "null" in setting.type:
            assert "null:" in setting.description, setting.name


@pytest.mark.parametrize("schema", JOBS)
def test_the_settings_are_those_of_the_sections(schema: type[Config]) -> None:
    described = {n: s for n, s in leaf_settings(schema).items() if "sampling." not in n}
    defaults = flat(schema().model_dump())
    assert described.keys() == defaults.keys()
    for name, setting in described.items():
        if name != "workdir":  # which becomes absolute
            assert setting.default == defaults[name], name
            assert (
                yaml.safe_load(yaml_text(setting.default))
                == flat(schema().model_dump(mode="json"))[name]
            )


def test_the_words_for_types() -> None:
    settings = leaf_settings(Config)
    assert settings["training.epochs"].type == "whole number, at least 1; or null"
    assert settings["data.label_noise"].type == "number, at least 0, at most 1"
    assert settings["extraction.interface"].type == "one of mlp, attn, both"
    assert settings["pairing.explicit"].type == (
        "list of lists of 2 whole numbers, at least 1; or null"
    )
    assert settings["evaluation.sampling"].type == "section; or null"
    assert leaf_settings(EvaluationJob)["adapter"].type == "text; or list of texts; or null"


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -1, 0.1, 3e-05, 1e16, 1e300, float("inf"), "", "a", "null", "Yes", "1e-3",
     "a b", "a: b", "a, b", "/x-y/z_w", "-", "#", "ü", "12",
     [], ["a", "no"], [[1, 2]], ["a,b"], {"a": 1}],
)  # fmt: skip
def test_values_read_as_they_were(value: object) -> None:
    text = yaml_text(value)
    assert yaml.safe_load(text) == value
    assert type(yaml.safe_load(text)) is type(value) and "\n" not in text


def test_runtime_settings() -> None:
    """All settings of resources, and none that a result depends on."""
    assert runtime_settings(Config) == {
        "workdir",
        "trust_remote_code",
        "plugins",
        "tracking.uri",
        "tracking.experiment",
        "tracking.run_name",
        "cluster.address",
        "cluster.autoscaling",
        "alignment.min_overlap",
        "alignment.unaligned",
        "data.shared_with",
        "attribution.batch_size",
        *(f"extraction.{name}" for name in ("store", "shard_examples", "batch_tokens")),
        *(f"extraction.{name}" for name in ("num_actors", "num_cpus", "num_gpus", "device_map")),
        "extraction.max_restarts",
        *(f"training.{name}" for name in ("num_workers", "cpus_per_worker", "use_gpu")),
        "training.max_failures",
        *(f"evaluation.{name}" for name in ("num_engines", "num_cpus", "num_gpus")),
        *(f"evaluation.{name}" for name in ("tensor_parallel_size", "kv_cache_gb")),
        *(f"evaluation.{name}" for name in ("max_restarts", "batch_items")),
        "evaluation.sandbox.num_workers",
    }
    evaluation = {
        name.removeprefix("evaluation.")
        for name in runtime_settings(Config)
        if name.split(".")[0] not in ("alignment", "attribution", "data", "extraction", "training")
    }
    assert runtime_settings(EvaluationJob) == evaluation
    own = runtime_settings(AnalysisJob) - runtime_settings(Config)
    assert own == {"num_cpus", "num_gpus", "device_map", "batch_size"}
    assert Config.model_json_schema()["properties"]["workdir"]["runtime"] is True


def test_given_settings() -> None:
    assert given_settings(Config()) == given_settings(resolve()) == {}
    config = resolve([], ["loss.alpha=0.1", "training.lora.rank=4", "evaluation.sampling={}"])
    given = {"loss.alpha": 0.1, "training.lora.rank": 4}
    assert given_settings(config) == given
    assert given_settings(pickle.loads(pickle.dumps(config))) == given
    assert given_settings(validate({"loss": {}, "evaluation": {"sampling": None}})) == {
        "evaluation.sampling": None
    }


def test_dotted_settings() -> None:
    tree = {"loss": {"alpha": 1}, "training": {"lora": {"rank": 4}}, "seed": 0}
    assert flat(tree) == {"loss.alpha": 1, "training.lora.rank": 4, "seed": 0}
    assert nested(flat(tree)) == tree
    assert lookup(tree, "training.lora.rank") == 4


def test_the_page_of_settings_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == reference(), (
        "run python -m semalign.config.reference"
    )
