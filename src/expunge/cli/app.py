"""The commands put together, and what their errors become: one line on stderr and an exit code."""

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from expunge import __version__
from expunge.cli.facts import first_line
from expunge.core.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130

HOMES = {
    "demo": "demo",
    "plan": "plan",
    "erase": "erase",
    "compose": "sequel",
    "undo": "sequel",
    "export": "export",
    "generate": "generate",
    "purify": "purify",
    "score": "score",
    "attack": "attack",
    "certify": "certify",
    "report": "report",
    "list": "listing",
}
"""In which file of this package each command is; the order is that of the help."""


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit
    return wanted


def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Erase concepts from image generators, and measure what is left of them.

    A first look: expunge demo. The whole road: expunge erase, then score, then report.
    """


def assemble(words: Sequence[str]) -> typer.Typer:
    """Put together what the words need: the command they name, or all of them as the help lists them.

    Importing every command takes longer than most of them. What only the list in the help needs, the first line of each
    docstring, is read from source.
    """
    app = typer.Typer(
        name="expunge",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode=None if os.environ.get("TERM") == "dumb" else "rich",
    )
    app.callback()(about)
    asked = next((word for word in words if not word.startswith("-")), "")
    for name in [asked] if asked in HOMES else HOMES:
        if name == "list":
            app.add_typer(import_module("expunge.cli.listing").listing, name=name)
        elif name != asked:
            app.command(name, help=first_line(Path(__file__).with_name(f"{HOMES[name]}.py"), name))(_listed)
        else:
            app.command(name)(getattr(import_module(f"expunge.cli.{HOMES[name]}"), name))
    return app


def _listed() -> None:
    """Stand for a command that the help only lists."""


def run(words: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 2 bad input, 3 a failed control, 130 interrupted."""
    try:
        code = assemble(words)(args=list(words) or ["--help"], prog_name="expunge", standalone_mode=False) or 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except (TyperException, InputError) as error:
        return _fail(error.format_message() if isinstance(error, TyperException) else str(error))
    except OSError as error:
        return _fail(_disk(error))
    if code == INTERRUPTED:
        typer.echo("interrupted; finished files are kept, and the same command goes on from the last of them", err=True)
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
