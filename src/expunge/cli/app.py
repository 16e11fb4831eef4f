"""The commands put together, and what their errors become: one line on stderr and an exit code."""

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from expunge import __version__
from expunge.cli.attack import attack
from expunge.cli.certify import certify
from expunge.cli.demo import demo
from expunge.cli.erase import erase
from expunge.cli.export import export
from expunge.cli.generate import generate
from expunge.cli.listing import listing
from expunge.cli.plan import plan
from expunge.cli.report import report
from expunge.cli.score import score
from expunge.cli.sequel import compose, undo
from expunge.core.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130

app = typer.Typer(
    name="expunge",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None if os.environ.get("TERM") == "dumb" else "rich",
)
for command in (demo, plan, erase, compose, undo, export, generate, score, attack, certify, report):
    app.command()(command)
app.add_typer(listing, name="list")


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Erase concepts from image generators, and measure what is left of them.

    A first look: expunge demo. The whole road: expunge erase, then score, then report.
    """


def run(words: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 2 bad input, 3 a failed control, 130 interrupted."""
    try:
        code = app(args=list(words) or ["--help"], prog_name="expunge", standalone_mode=False) or 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except (TyperException, InputError) as error:
        return _fail(error.format_message() if isinstance(error, TyperException) else str(error))
    except OSError as error:
        return _fail(_disk(error))
    if code == INTERRUPTED:
        typer.echo("interrupted; finished files are kept: drawing and judging continue, erasing starts anew", err=True)
    return int(code)


def _fail(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return BAD_INPUT


def _disk(error: OSError) -> str:
    if error.errno == errno.EPIPE:
        # the reader of our output has gone; a second failure while Python flushes at exit would print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"
