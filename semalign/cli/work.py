"""`semalign runs`, `compare` and `clean`: what is in a work folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semalign.cli.app import app
from semalign.errors import UserError

if TYPE_CHECKING:
    from semalign.cli.folder import Entry

Workdir = Annotated[
    Path, typer.Option("--workdir", "-w", help="The work folder.", show_default=True)
]


@app.command("runs")
def runs_command(workdir: Workdir = Path("work")) -> None:
    """List what is in a work folder, the newest first.

    Name, method, task, score, age and size of each run. The score is on the task that was trained
    on, in percent, with its 95% interval.
    """
    from semalign.cli.folder import (
        ARTIFACT_KINDS,
        RUN_KINDS,
        UNFINISHED,
        age_text,
        entries,
    )
    from semalign.cli.tables import print_table
    from semalign.files import bytes_text

    runs = sorted(entries(workdir, RUN_KINDS), key=lambda entry: entry.made, reverse=True)
    rows = [[e.name, e.kind, *_summary(e), age_text(e.age), bytes_text(e.size)] for e in runs]
    print_table(f"{workdir}", ["name", "kind", "method", "task", "score", "age", "size"], rows)
    held = entries(workdir, (*ARTIFACT_KINDS, UNFINISHED))
    kinds = dict.fromkeys(entry.kind for entry in held)
    parts = [[e for e in held if e.kind == kind] for kind in kinds]
    shared = [[p[0].kind, str(len(p)), bytes_text(sum(e.size for e in p))] for p in parts]
    print_table("shared by runs", ["kind", "number", "size"], shared)


def _summary(entry: Entry) -> tuple[str, str, str]:
    """Method, task and score of a run, as text."""
    from semalign.cli.folder import read
    from semalign.report.table import interval

    if entry.kind == "sweeps":
        state = "" if entry.finished else ", unfinished"
        return "", "", f"{len(entry.trials)} trials{state}"
    if not entry.finished:
        return "", "", "unfinished"
    if entry.kind != "transfers":
        return "", "", ""
    found = read(entry.path / "scores.json") or {}
    method, task = str(found.get("method", "")), str(found.get("task", ""))
    splits = found.get("scores", {})
    for split in ("test", *splits):
        if (score := splits.get(split, {}).get(task, {}).get("transferred")) is not None:
            text = interval(score["value"], score["low"], score["high"])
            return method, task, f"{split} {text}"
    return method, task, ""


@app.command("compare")
def compare_command(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help="Finished transfers or sweeps: folders, names or keys; a beginning is enough.",
            show_default=False,
        ),
    ],
    workdir: Workdir = Path("work"),
) -> None:
    """Compare finished runs on the same items, by a paired test.

    Shows all scores, and the difference of each run to the first.

    Of a sweep its chosen setting is compared, with each item's score averaged over the seeds.
    """
    from semalign.cli.comparing import contender, show_comparison
    from semalign.cli.folder import find_entry

    if len(runs) < 2:
        raise UserError(f"expected at least two runs to compare, found {len(runs)}")
    found = [find_entry(workdir, name, ("transfers", "sweeps")) for name in runs]
    show_comparison([contender(entry) for entry in found])


@app.command("clean")
def clean_command(
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="AGE", help="What is older, e.g. 30d, 12h or 45min."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="What is of a kind, e.g. activations; may be repeated."),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(
            "--run",
            help="A transfer, sweep or analysis by name or key, with what no other run needs; "
            "may be repeated.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    workdir: Workdir = Path("work"),
) -> None:
    """Delete from a work folder, by age, kind or run.

    What and how many bytes is shown first.

    Where several options are given, only what fits all of them is deleted. Runs that are repeated
    make again what they need. MLflow's runs are left.
    """
    from semalign.cli.cleaning import chosen, delete
    from semalign.cli.folder import age_text
    from semalign.cli.tables import print_table
    from semalign.files import bytes_text

    found = chosen(workdir, older_than=older_than, kinds=kind or (), runs=run or ())
    if not found:
        print(f"{workdir}: nothing fits")
        return
    rows = [[e.name, e.kind, age_text(e.age), bytes_text(e.size)] for e in found]
    print_table(f"{workdir}", ["name", "kind", "age", "size"], rows)
    total = bytes_text(sum(entry.size for entry in found))
    if not yes:
        typer.confirm(f"Delete these {len(found)} folders, {total}?", abort=True)
    delete(workdir, found)
    print(f"deleted {len(found)} folders, {total}")
