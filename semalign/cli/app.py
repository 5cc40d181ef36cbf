"""The command itself: its options, and from an error to one line and an exit status.

Importing this package imports nothing but typer: what a command needs is imported when it runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from semalign.errors import Failed, UserError

DONE, FAILED, BAD_INPUT = 0, 1, 2  # exit statuses


class OneLine(TyperGroup):
    """Commands whose expected errors are one line on stderr, and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _output(quiet=bool(ctx.params.get("quiet"))):
                return super().invoke(ctx)
        except (UserError, Failed) as error:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            # raised in another process, it comes wrapped with that process's traceback
            print(f"error: {getattr(error, 'cause', None) or error}", file=sys.stderr)
            status = BAD_INPUT if isinstance(error, UserError) else FAILED
            raise typer.Exit(status) from None


@contextlib.contextmanager
def _output(*, quiet: bool) -> Any:
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield


app = typer.Typer(
    name="semalign",
    cls=OneLine,
    help="Transfer knowledge between language models of different scale, by activations.",
    epilog="Exit status: 0 done, 1 the run failed, 2 bad input.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help is there sooner
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from semalign import __version__

        typer.echo(f"semalign {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log more, and show where an error came from.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors alone.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's; returns the exit status:
    0 done, 1 the run failed, 2 bad input.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="semalign")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE
    return DONE
