"""Controls: the same rows, layers and steps without the teacher's hidden states."""

from __future__ import annotations

from collections.abc import Mapping

from semalign.config.jobs import Config
from semalign.core.pairing import Pair
from semalign.errors import UserError
from semalign.methods.inputs import Inputs, labelled
from semalign.methods.method import Method, Recipe, register_method
from semalign.methods.paired import OTHER_METHODS, Paired
from semalign.models.support import check_lora
from semalign.stages.adaptation import adaptation
from semalign.stages.update import Update

EXTRACTION = (
    "extraction.interface",
    "extraction.positions",
    "extraction.layers",
    "extraction.dtype",
)
ALIGNMENT = ("loss.objective", "alignment.map", "alignment.top_k")


def without_alignment(config: Config, gamma: float = 0.0) -> Config:
    """The configuration with no alignment term, and a KL term of that weight."""
    loss = config.loss.model_copy(update={"alpha": 0.0, "gamma": gamma})
    return config.model_copy(update={"loss": loss})


class Sft(Paired):
    """Cross-entropy alone, on the layers that SemAlign would train."""

    aligns = False

    def effective(self, config: Config) -> Config:
        return without_alignment(super().effective(config))

    def unused(self, config: Config) -> Mapping[str, str]:
        fixed = dict.fromkeys(("loss.alpha", "loss.gamma"), f"method={config.method}")
        return {**super().unused(config), **fixed}


class LogitKd(Paired):
    """Cross-entropy and KL to the teacher's output, on the layers that SemAlign would train."""

    aligns = False

    def effective(self, config: Config) -> Config:
        given = "gamma" in config.loss.model_fields_set
        if given and config.loss.gamma == 0:
            raise UserError(
                "loss.gamma=0: method=logit-kd needs a weight above 0; leave it out for 1"
            )
        return without_alignment(super().effective(config), config.loss.gamma if given else 1.0)

    def unused(self, config: Config) -> Mapping[str, str]:
        return {**super().unused(config), "loss.alpha": f"method={config.method}"}


class SftAll(Method):
    """Cross-entropy alone, on all layers of the student."""

    def effective(self, config: Config) -> Config:
        return without_alignment(config)

    def unused(self, config: Config) -> Mapping[str, str]:
        names = (*OTHER_METHODS, "loss.alpha", "loss.gamma", *ALIGNMENT, *EXTRACTION, "pairing",
                 "attribution", "data.attribution_split")  # fmt: skip
        full = {"training.lora": "training.adapter=full"} if self.rank(config) is None else {}
        return {**dict.fromkeys(names, f"method={config.method}"), **full}

    def rank(self, config: Config) -> int | None:
        return config.training.lora.rank if config.training.adapter == "lora" else None

    def check(self, config: Config, inputs: Inputs) -> None:
        if config.training.adapter == "lora":
            layers = tuple(range(inputs.student.layers))
            check_lora(inputs.student, layers, config.training.lora.target_modules)

    def recipe(self, config: Config, inputs: Inputs, pairs: tuple[Pair, ...]) -> Recipe:
        layers = range(inputs.student.layers)
        training = config.training
        update = Update(
            name=f"{config.data.task}-{config.method}",
            student=inputs.student,
            rows=inputs.train,
            labelled=labelled(config, inputs.train),
            adaptation=adaptation(training.adapter, layers, training.lora, config.seed),
            loss=config.loss,
            training=training,
            extraction=config.extraction,
            seed=config.seed,
        )
        return Recipe(pairs=(), artifacts=(update,))


register_method("sft", Sft())
register_method("sft-all", SftAll())
register_method("logit-kd", LogitKd())
