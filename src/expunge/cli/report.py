"""`expunge report`: a run folder → one page."""

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.console import Out
from expunge.cli.options import Json
from expunge.cli.places import run_folder


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder that `expunge score` has filled.")],
    json: Json = False,
) -> None:
    """Write report.html: before/after pictures, rates with intervals, what was changed."""
    screen = Out(machine=json)
    page = write_page(run_folder(folder))
    screen.emit({"report": str(page), "bytes": page.stat().st_size})
    screen.say(str(page))


def write_page(folder: Path) -> Path:
    """Render a run folder's page beside its numbers, whole or not at all."""
    from expunge.report.page import render
    from expunge.stages._files import write_bytes

    page = folder / "report.html"
    write_bytes(page, render(folder).encode())
    return page
