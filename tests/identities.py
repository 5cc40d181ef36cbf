"""Which names change with a setting: docs/identities.md, from the artifacts themselves.

    python -m tests.identities

Every setting is given another value in each base configuration, and all keys are compared. Nothing
is made: where pairs depend on attribution or similarity, invented scores stand in for them. A new
setting needs a value in OTHERS and, where it has an effect in none of BASES, a base in OWN.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from semalign import zoo
from semalign.artifacts.artifact import Artifact, ordered
from semalign.config.describe import leaf_settings, yaml_text
from semalign.config.jobs import Config
from semalign.config.read import resolve
from semalign.data.root import data_root, scored_examples
from semalign.files import content_key, write_json
from semalign.methods import Transfer, inputs
from semalign.methods.inputs import load_inputs
from semalign.methods.method import effective, filled, method_of, used_settings
from semalign.models.reference import Model
from semalign.stages.attribution import LayerScores
from semalign.stages.extraction import Prefix
from semalign.stages.judged import Candidate, Records
from semalign.stages.scoring import chosen_protocol
from semalign.stages.similarity import Similarity

FILE = Path(__file__).parents[1] / "docs" / "identities.md"
COLUMNS = (
    "attribution",
    "similarity",
    "activations",
    "prefix",
    "bases",
    "map",
    "factors",
    "training",
    "laten",
    "records",
    "records of the result",
    "run",
    "trial",
)
ARTIFACTS = COLUMNS[:-2]
_SPLITS = ("train", "extract", "align", "dev", "test")
_ROWS = 8

# Base configurations, beside a small data root and one task that is scored.
BASES: dict[str, tuple[str, ...]] = {
    "semalign": ("pairing.strategy=cka",),
    "semalign, other terms": ("loss.objective=fisher", "loss.gamma=0.5"),
    "sft": ("method=sft",),
    "sft-all": ("method=sft-all",),
    "logit-kd": ("method=logit-kd",),
    "seeking": ("method=seeking",),
    "laten": ("method=laten",),
}
# Further ones, for settings that have no effect in those.
OWN: dict[str, tuple[str, ...]] = {
    "pairing.explicit": ("pairing.strategy=explicit", "pairing.explicit=[[2, 2]]"),
    "evaluation.limit_seed": ("evaluation.limit=5",),
    "evaluation.sampling.n": ("evaluation.sampling={}",),
    "evaluation.sampling.temperature": ("evaluation.sampling={}",),
    "evaluation.sampling.top_p": ("evaluation.sampling={}",),
    "evaluation.sampling.k": ("evaluation.sampling={}",),
}
# Another value of every setting. {edited} is the data root without its first rows.
OTHERS: dict[str, Any] = {
    "dtype": "bfloat16",
    "trust_remote_code": True,
    "workdir": "elsewhere",
    "plugins": ["json"],
    "method": "sft",
    "teacher": "zoo/code-teacher",
    "student": "zoo/teacher",
    "seed": 1,
    "data.root": "{edited}",
    "data.task": "gsm8k",
    "data.train_split": "align",
    "data.attribution_split": "align",
    "data.train_limit": 5,
    "data.labelled_limit": 4,
    "data.label_noise": 0.5,
    "data.shared_with": ["test"],
    "data.max_length": 60,
    "attribution.granularity": "mlp",
    "attribution.aggregation": "sum",
    "attribution.top_n": 2,
    "attribution.batch_size": 3,
    "pairing.strategy": "reverse",
    "pairing.explicit": [[3, 1]],
    "extraction.interface": "both",
    "extraction.positions": "answer",
    "extraction.layers": [1],
    "extraction.dtype": "float32",
    "extraction.store": "elsewhere",
    "extraction.shard_examples": 3,
    "extraction.batch_tokens": 100,
    "extraction.num_actors": 2,
    "extraction.num_cpus": 2,
    "extraction.num_gpus": 1,
    "extraction.device_map": "auto",
    "extraction.max_restarts": 7,
    "alignment.map": "dual",
    "alignment.top_k": 9,
    "alignment.min_overlap": 0.5,
    "alignment.unaligned": "refuse",
    "loss.objective": "geometry",
    "loss.alpha": 0.3,
    "loss.beta": 0.5,
    "loss.gamma": 0.7,
    "training.adapter": "full",
    "training.epochs": 2,
    "training.lr": 0.002,
    "training.batch_size": 4,
    "training.micro_batch_size": 2,
    "training.weight_decay": 0.1,
    "training.warmup_ratio": 0.5,
    "training.max_grad_norm": 0.5,
    "training.num_workers": 2,
    "training.cpus_per_worker": 2,
    "training.use_gpu": True,
    "training.max_failures": 7,
    "training.lora.rank": 4,
    "training.lora.alpha": 5,
    "training.lora.dropout": 0.1,
    "training.lora.target_modules": ["up_proj"],
    "seeking.layers": 2,
    "seeking.modules": ["up_proj"],
    "seeking.rank": 4,
    "seeking.dropout": 0.2,
    "seeking.subtract": "block",
    "laten.share": 0.2,
    "laten.layers": 2,
    "laten.align_split": "extract",
    "laten.steps": 1,
    "laten.cycle": 50,
    "laten.pool": 4,
    "laten.lr": 0.001,
    "laten.weight_decay": 0.2,
    "laten.size_penalty": 1.0,
    "laten.readout": "as_coded",
    "evaluation.tasks": ["mbpp", "gsm8k"],
    "evaluation.splits": ["dev"],
    "evaluation.root": "{edited}",
    "evaluation.limit": 5,
    "evaluation.limit_seed": 3,
    "evaluation.protocol": "open-instruct",
    "evaluation.num_engines": 2,
    "evaluation.num_cpus": 2,
    "evaluation.num_gpus": 1,
    "evaluation.tensor_parallel_size": 2,
    "evaluation.max_model_len": 512,
    "evaluation.kv_cache_gb": 2.0,
    "evaluation.max_restarts": 7,
    "evaluation.batch_items": 9,
    "evaluation.sampling": {"n": 3},
    "evaluation.sampling.n": 5,
    "evaluation.sampling.temperature": 0.7,
    "evaluation.sampling.top_p": 0.5,
    "evaluation.sampling.k": 2,
    "evaluation.sandbox.min_tier": 3,
    "evaluation.sandbox.num_workers": 2,
    "tracking.uri": "sqlite:///elsewhere.db",
    "tracking.experiment": "other",
    "tracking.run_name": "other",
    "cluster.address": "auto",
    "cluster.autoscaling": True,
}

_SAMPLING = [name for name in OTHERS if name.startswith("evaluation.sampling.")]

Keys = dict[str, tuple[str, ...]]  # column -> the keys in it, none where nothing is made


@dataclass(frozen=True)
class Change:
    """What one setting changes in one base, where it is `used` or not."""

    setting: str
    base: str
    used: bool
    columns: frozenset[str]


@dataclass
class Measured:
    changes: list[Change] = field(default_factory=list)

    def columns(self, setting: str) -> set[str]:
        """What it changes in any base in which it has an effect."""
        found = [c.columns for c in self.changes if c.setting == setting and c.used]
        return set().union(*found)


def trial_id(config: Config) -> str:
    """The id of a sweep's trial of that configuration, which is an effective one."""
    return content_key(used_settings(config))


def measure(settings: Iterable[str] | None = None) -> Measured:
    """Every setting (or some), in every base."""
    names = list(settings or leaf_settings(Config))
    with tempfile.TemporaryDirectory() as folder, chdir(folder), _models_once():
        return Measured([*_Bench(Path(folder)).changes(names)])


@contextmanager
def _models_once() -> Iterator[None]:
    """Within the context each tokenizer is read once, and each pair of them compared once."""
    names = ("load_tokenizer", "read_vocabulary", "shared_tokens")
    plain = {name: getattr(inputs, name) for name in names}
    for name, function in plain.items():
        setattr(inputs, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(inputs, name, function)


class _Bench:
    """A folder with two small data roots and what stands in for made artifacts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.roots = {"{plain}": folder / "plain", "{edited}": folder / "edited"}
        for first, root in enumerate(self.roots.values()):
            for task in ("mmlu", "gsm8k", "humaneval", "mbpp"):
                (root / task).mkdir(parents=True)
                for split in _SPLITS:
                    text = (zoo.path("zoo/data") / task / f"{split}.jsonl").read_text()
                    rows = text.splitlines(keepends=True)[first : first + _ROWS]
                    (root / task / f"{split}.jsonl").write_text("".join(rows))
        self.keys_of = functools.cache(self._base_keys)

    def config(self, overrides: Sequence[str]) -> Config:
        common = (
            "data.root={plain}",
            "evaluation.tasks=[mbpp]",
            f"workdir={self.folder / 'work'}",
        )
        texts = [*common, *overrides]
        for name, root in self.roots.items():
            texts = [text.replace(name, str(root)) for text in texts]
        return resolve([], texts)

    def changes(self, settings: Iterable[str]) -> Iterator[Change]:
        for base, overrides in BASES.items():
            used = used_settings(effective(self.config(overrides)))
            for setting in (name for name in settings if name in used):
                if setting != "method" or base == "semalign":  # a base is a method
                    columns = self._changed([setting], overrides, checked=True)
                    yield Change(setting, base, True, columns)
            unused = [name for name in settings if name not in used and name not in _SAMPLING]
            for together in (  # a dual map has no coefficients to choose from
                [name for name in unused if name != "alignment.top_k"],
                [name for name in unused if name == "alignment.top_k"],
            ):
                # one by one only where all at once change something
                nothing = not self._changed(together, overrides)
                for setting in together:
                    columns = frozenset() if nothing else self._changed([setting], overrides)
                    yield Change(setting, base, False, columns)
        for setting in (name for name in settings if name in OWN):
            columns = self._changed([setting], OWN[setting], checked=True)
            yield Change(setting, "its own", True, columns)

    def _changed(
        self, settings: Sequence[str], overrides: tuple[str, ...], *, checked: bool = False
    ) -> frozenset[str]:
        """The columns that change with the settings; not `checked`: even if they are refused."""
        if not settings:
            return frozenset()
        given = self.config([*overrides, *(f"{name}={_text(OTHERS[name])}" for name in settings)])
        found = effective(given) if checked else filled(given)
        before, after = self.keys_of(overrides), self.keys(found)
        return frozenset(column for column in COLUMNS if before[column] != after[column])

    def _base_keys(self, overrides: tuple[str, ...]) -> Keys:
        return self.keys(effective(self.config(overrides)))

    def keys(self, config: Config) -> Keys:
        """All keys of a transfer. `config` is an effective one."""
        method = method_of(config)
        read = load_inputs(
            config,
            trained=method.trained_splits(config),
            align_split=method.align_split(config),
        )
        transfer = Transfer(config, read)
        places = [self._stand_in(artifact) for artifact in transfer.first]
        pairs = method.pairs(config, transfer.inputs, places)
        recipe = method.recipe(config, transfer.inputs, pairs)
        found: dict[str, list[str]] = {column: [] for column in COLUMNS}
        for artifact in ordered(recipe.artifacts):
            found["prefix" if isinstance(artifact, Prefix) else artifact.kind].append(artifact.key)
        for column, model, adapter in (
            ("records", transfer.inputs.student, None),
            ("records of the result", *self._result(recipe.result, transfer)),
        ):
            found[column].append(_records(config, model, adapter).key)
        found["run"].append(transfer.key)
        found["trial"].append(trial_id(config))
        return {column: tuple(keys) for column, keys in found.items()}

    def _stand_in(self, artifact: Artifact) -> Path:
        """A folder as the artifact's, with scores by which the last teacher layer is the most
        critical and the first comes next, and each is most like a student layer of its own.
        """
        place = self.folder / artifact.kind / artifact.key
        if isinstance(artifact, LayerScores):
            layers = artifact.model.layers
            write_json(place / "scores.json", {"scores": [2.0, *[1.0] * (layers - 2), 3.0]})
        elif isinstance(artifact, Similarity):
            rows, columns = artifact.teacher.layers, artifact.student.layers
            cka = [[float(row % columns == column) for column in range(columns)]
                   for row in range(rows)]  # fmt: skip
            write_json(place / "cka.json", {"cka": cka})
        return place

    def _result(self, result: Artifact, transfer: Transfer) -> tuple[Model, str | None]:
        """Stands in for the result: its content is its key."""
        config, method = transfer.config, transfer.method
        served = replace(transfer.inputs.student, dtype=method.dtype(config))
        if method.rank(config) is None:
            return replace(served, weights=result.key), None
        folder = self.folder / "adapter" / result.key
        plain = {"r": 1, "lora_alpha": 2, "target_modules": ["v_proj"]}
        write_json(folder / "adapter_config.json", plain)
        (folder / "adapter_model.safetensors").write_text(result.key)
        return served, str(folder)


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else yaml_text(value)


def _records(config: Config, model: Model, adapter: str | None) -> Records:
    """Of MBPP's dev split."""
    settings = config.evaluation
    root = data_root(settings.root or config.data.root)
    return Records(
        candidate=Candidate(name="candidate", model=model, adapter=adapter),
        task="mbpp",
        split="dev",
        examples=scored_examples(settings, root, "mbpp", "dev"),
        protocol=chosen_protocol(settings),
        max_model_len=settings.max_model_len,
        min_tier=settings.sandbox.min_tier,
    )


_HEAD = """# What a setting changes

Made by `python -m tests.identities`; a test compares. An x: the key changes when the setting alone
is changed, in some configuration in which it has an effect. What keeps its key is not made again.

Columns are the artifacts, then the MLflow run of a transfer and the trial of a sweep. `training` is
the result of every method but LaTen, whose is `laten`; `records` are a split's judged outputs of
the untrained student. Settings without an x decide where and how fast a run goes, and nothing of
what comes out.
"""


def table(measured: Measured) -> str:
    settings = leaf_settings(Config).values()
    rows = [f"| setting | {' | '.join(COLUMNS)} |", f"|---|{':-:|' * len(COLUMNS)}"]
    for setting in sorted(settings, key=lambda setting: setting.runtime):
        changed = measured.columns(setting.name)
        marks = " | ".join("x" if column in changed else " " for column in COLUMNS)
        rows.append(f"| `{setting.name}` | {marks} |")
    return _HEAD + "\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    FILE.write_text(table(measure()), encoding="utf-8")
