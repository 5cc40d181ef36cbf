"""The transfers of a sweep's trials, whose inputs are read once, and what they are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from semalign.config.jobs import Config
from semalign.files import content_key
from semalign.methods.inputs import Inputs, check_layers, load_inputs
from semalign.methods.method import Transfer, method_of
from semalign.stages.judged import evaluated_content
from semalign.sweep.trials import Trial


def transfers(trials: Sequence[Trial], *, planned: bool = False) -> dict[str, Transfer]:
    """Each trial's transfer by its id; trials that read the same share their inputs. No weights are
    loaded.

    `planned`, and raises UserError, as `load_inputs`.
    """
    loaded: dict[str, Inputs] = {}
    checked: set[str] = set()
    found = {}
    for trial in trials:
        config = trial.config
        method = method_of(config)
        split, trained = method.align_split(config), method.trained_splits(config)
        key = _inputs_key(config, split, trained)
        if key not in loaded:
            loaded[key] = load_inputs(config, trained=trained, align_split=split, planned=planned)
        inputs = loaded[key]
        layers = (
            key
            + config.pairing.model_dump_json()
            + content_key(config.extraction.layers, config.attribution.top_n)
        )
        if layers not in checked:
            checked.add(layers)
            check_layers(config, inputs.teacher.layers, inputs.student.layers)
        modules = key + content_key(
            config.method, config.training.adapter, config.training.lora.target_modules,
            config.seeking.model_dump(mode="json"), config.laten.model_dump(mode="json"),
        )  # fmt: skip
        if modules not in checked:
            checked.add(modules)
            method.check(config, inputs)
        found[trial.id] = Transfer(config, inputs)
    return found


def _inputs_key(config: Config, align_split: str | None, trained: Sequence[str]) -> str:
    """Of all settings that `load_inputs` looks at, but the layers."""
    data = config.data
    if data.label_noise == 0:  # rows without labels are read all the same
        data = data.model_copy(update={"labelled_limit": None})
    return content_key(
        *(config.teacher, config.student, config.dtype, config.trust_remote_code, config.workdir),
        *(config.alignment.min_overlap, align_split, list(trained)),
        *(data.model_dump_json(), config.evaluation.model_dump_json()),
    )


def contents(transfers: Mapping[str, Transfer]) -> list[str]:
    """Hashes of what the settings of transfers only name: models, rows, questions, protocols."""
    inputs = {id(t.inputs): t.inputs for t in transfers.values()}.values()
    models = {model for own in inputs for m in (own.teacher, own.student)
              for model in (m.weights, m.tokens, m.serving)}  # fmt: skip
    rows = {rows.key for own in inputs for rows in (own.train, own.attribution, own.align)}
    seen: dict[str, Any] = {}
    for transfer in transfers.values():
        config = transfer.config
        key = content_key(config.evaluation.model_dump_json(), config.data.root)
        if key not in seen:
            seen[key] = evaluated_content(config)
    judged = {content_key(content) for content in seen.values()}
    return [text for found in (models, rows, judged) for text in sorted(found)]
