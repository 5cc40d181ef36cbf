"""The command itself: its options, and from an error to one line and an exit status.

Importing this package imports nothing but typer: what a command needs is imported when it runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from semalign.errors import Failed, Terminated, UserError, one_line, root_cause

DONE, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143  # exit statuses
_LOGS: ContextVar[Path | None] = ContextVar("logs", default=None)


class OneLine(TyperGroup):
    """Commands whose expected errors are one line on stderr, and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        _LOGS.set(None)
        try:
            with _output(quiet=bool(ctx.params.get("quiet"))):
                return super().invoke(ctx)
        except (TyperException, typer.Exit, typer.Abort, BrokenPipeError):
            raise  # typer's own endings, and a reader that has gone
        except (Exception, KeyboardInterrupt) as error:
            if ctx.params.get("verbose"):
                traceback.print_exc()
            line, status = _ending(error)
            print(f"error: {line}", file=sys.stderr)
            raise typer.Exit(status) from None


def begin(folder: Path) -> None:
    """Before a command that runs or plans: what its process imports, and where its log goes if it
    fails for a reason that is not known.
    """
    from semalign.models.light_imports import keep_imports_light

    keep_imports_light()
    _LOGS.set(folder)


def _ending(error: BaseException) -> tuple[str, int]:
    """What to print about an error, and the exit status.

    An error that is none of ours is a line, too, with the file that its traceback is written to.
    """
    cause = root_cause(error)
    if isinstance(cause, UserError):
        return str(cause), BAD_INPUT
    if isinstance(cause, Failed):
        return str(cause), FAILED
    if isinstance(cause, KeyboardInterrupt):
        terminated = isinstance(cause, Terminated)
        end = "terminated" if terminated else "interrupted"
        line = f"{end}; the same command goes on where this one was"
        return line, TERMINATED if terminated else INTERRUPTED
    text = one_line(f"{type(cause).__name__}: {cause}", limit=300)
    return f"{text}; the traceback is in {_log(error)}", FAILED


def _log(error: BaseException) -> Path:
    """The file with the whole traceback: in the work folder, or else among the temporary files."""
    text = "".join(traceback.format_exception(error))
    for place in (_LOGS.get(), Path(tempfile.gettempdir())):
        if place is not None and place.is_dir():
            file = place / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
            with contextlib.suppress(OSError):
                file.write_text(text, encoding="utf-8")
                return file
    print(text, file=sys.stderr)
    return Path("the lines above")


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
    epilog="Exit status: 0 done, 1 the run failed, 2 bad input, 130 interrupted, 143 terminated.",
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


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's; returns the exit status:
    0 done, 1 the run failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="semalign")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE
    return DONE
