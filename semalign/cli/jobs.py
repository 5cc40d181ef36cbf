"""`semalign transfer`, `ablate`, `evaluate`, `analyze`, and their files: `config` and `init`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from semalign.cli.app import app, begin
from semalign.cli.settings import (
    JobCommand,
    JobKind,
    SweepCommand,
    Words,
    resolved,
    schema_of,
    split_words,
)
from semalign.errors import UserError

if TYPE_CHECKING:
    from semalign.sweep.file import Sweep

PlanOption = Annotated[
    bool,
    typer.Option("--plan", help="Show what would happen and cost, and stop; loads no weights."),
]


LocalOption = Annotated[
    bool, typer.Option("--local", help="Run in this process and an engine's, without Ray.")
]


@app.command("transfer", cls=JobCommand)
def transfer_command(
    words: Words = None, plan: PlanOption = False, local: LocalOption = False
) -> None:
    """Transfer from a teacher to a student, and score the result.

    semalign transfer data.task=mmlu pairing.strategy=interpolated loss.alpha=0.3
    """
    config = resolved(words, schema_of("transfer"))
    begin(config.work)
    if plan:
        from semalign.engine.planning import show_plan

        show_plan(config)
    else:
        from semalign.engine.transfer import run_transfer

        run_transfer(config, local=local)


@app.command("ablate", cls=SweepCommand)
def ablate_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SWEEP.yaml|key=value|sweep.key=value",
            help="The sweep, overrides of its base, and overrides of the sweep itself.",
            show_default=False,
        ),
    ] = None,
    plan: PlanOption = False,
    yes: Annotated[bool, typer.Option("--yes", help="Run more than 10,000 trials.")] = False,
) -> None:
    """Run a sweep: many transfers that share what they can.

    semalign ablate sweeps/pairing.yaml training.epochs=1 sweep.seeds=[0]
    """
    sweep = read_sweep(words or ())
    begin(Path(sweep.base["workdir"]))
    if plan:
        from semalign.engine.planning import show_sweep_plan

        show_sweep_plan(sweep, yes=yes)
    else:
        from semalign.engine.tuning import ablate

        ablate(sweep, yes=yes)


@app.command("evaluate", cls=JobCommand)
def evaluate_command(
    words: Words = None, plan: PlanOption = False, local: LocalOption = False
) -> None:
    """Score a model, or adapters of it.

    semalign evaluate model=zoo/student tasks=[humaneval,mbpp] protocol=paper
    """
    job = resolved(words, schema_of("evaluate"))
    begin(job.work)
    if plan:
        from semalign.engine.scoring import show_evaluation_plan

        show_evaluation_plan(job)
    else:
        from semalign.engine.scoring import run_evaluation

        run_evaluation(job, local=local)


@app.command("analyze", cls=JobCommand)
def analyze_command(
    words: Words = None, plan: PlanOption = False, local: LocalOption = False
) -> None:
    """Make one figure of the paper's analysis.

    semalign analyze figure=similarity teacher=zoo/teacher student=zoo/student
    """
    job = resolved(words, schema_of("analyze"))
    begin(job.work)
    if plan:
        from semalign.engine.analysis import show_analysis_plan

        show_analysis_plan(job)
    else:
        from semalign.engine.analysis import run_analysis

        run_analysis(job, local=local)


def read_sweep(words: Sequence[str]) -> Sweep:
    """The sweep of a command's words: its file, as a word of its own or `sweep=FILE`, and
    overrides.
    """
    from semalign.cli.shipped import find_sweep
    from semalign.sweep.file import load_sweep

    files, overrides = split_words(words)
    files += [word.removeprefix("sweep=") for word in overrides if word.startswith("sweep=")]
    if len(files) != 1:
        raise UserError(
            f"expected one sweep file, e.g. sweeps/pairing.yaml; found {', '.join(files) or 'none'}"
        )
    return load_sweep(
        find_sweep(files[0]), [word for word in overrides if not word.startswith("sweep=")]
    )


@app.command("config")
def config_command(
    words: Words = None,
    job: Annotated[JobKind, typer.Option("--job", help="What the settings are of.")] = "transfer",
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of the settings instead.")
    ] = False,
) -> None:
    """Print the settings of a job as YAML, each with its source."""
    from semalign.cli.starter import sourced

    files, overrides = split_words(words or ())
    if schema:
        import json

        print(json.dumps(schema_of(job).model_json_schema(), indent=2))
        return
    print(sourced(files, overrides, schema_of(job)), end="")


@app.command("init")
def init_command(
    job: Annotated[
        Literal["transfer", "evaluate", "analyze", "sweep"],
        typer.Argument(help="What the file is for.", show_default=False),
    ],
    file: Annotated[
        Path | None,
        typer.Argument(help="Where it goes; by default <job>.yaml here.", show_default=False),
    ] = None,
) -> None:
    """Write a starter file for a job or a sweep.

    Every setting is there with its default and description, commented out. A file that exists is
    left as it is.
    """
    from semalign.cli.starter import starter

    target = file or Path(f"{job}.yaml")
    try:
        with target.open("x", encoding="utf-8") as handle:
            handle.write(starter(job))
    except FileExistsError:
        raise UserError(f"{target}: exists already; name another file") from None
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    command = "ablate" if job == "sweep" else job
    print(f"{target}: semalign {command} {target}")
