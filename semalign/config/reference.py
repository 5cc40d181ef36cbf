"""docs/settings.md: every setting of every job, from the sections themselves.

python -m semalign.config.reference
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel

from semalign.config.describe import Setting, leaf_settings, yaml_text
from semalign.config.jobs import AnalysisJob, Config, EvaluationJob
from semalign.config.read import ENVIRONMENT

FILE = Path(__file__).parents[2] / "docs" / "settings.md"
_INTRODUCTION = f"""# Settings

`python -m semalign.config.reference` writes this page from `semalign/config/`.

A setting is given in a YAML file, nested (`loss: {{alpha: 0.3}}`) or dotted (`loss.alpha: 0.3`), or
on the command line (`loss.alpha=0.3`). Later files win over earlier ones, the command line over all
files, and any of them over the environment and the defaults. The environment variables are
{" and ".join(ENVIRONMENT.values())}. `semalign config` shows where each value came from.

Settings marked *runtime* decide whether, where and how fast a run goes, and nothing of what comes
out: with other values of these, a run that is repeated in its work folder finds everything done.
"""
_JOBS: dict[str, tuple[type[BaseModel], str]] = {
    "Transfer": (Config, "`semalign transfer`, and `base` and `axes` of `semalign ablate`."),
    "Evaluation": (EvaluationJob, "`semalign evaluate`."),
    "Analysis": (AnalysisJob, "`semalign analyze`; a setting that the figure does not use is "
                 "refused."),
}  # fmt: skip


def reference() -> str:
    """The page, as Markdown."""
    parts = [_INTRODUCTION]
    for title, (schema, command) in _JOBS.items():
        parts.append(f"## {title}\n\n{command}\n")
        settings = leaf_settings(schema).values()
        for section in dict.fromkeys(setting.section for setting in settings):
            heading = f"### {title}: `{section}`\n\n" if section else ""
            parts.append(heading + _table(s for s in settings if s.section == section))
    return "\n".join(parts)


def _table(settings: Iterable[Setting]) -> str:
    lines = ["| setting | type | default | description |", "| --- | --- | --- | --- |"]
    for setting in settings:
        description = f"{setting.description}{' *runtime*' if setting.runtime else ''}"
        default = "" if setting.type.startswith("section") else f"`{yaml_text(setting.default)}`"
        cells = (f"`{setting.name}`", setting.type, default, description)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
