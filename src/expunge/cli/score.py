"""`expunge score`: how much of the target is left, and what stayed."""

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.console import Out
from expunge.cli.measure import as_data, measure, show
from expunge.cli.options import Device, Json, ModelOrRun
from expunge.cli.places import Place, place
from expunge.core.errors import InputError


def score(
    source: ModelOrRun,
    suite: Annotated[
        str, typer.Option(help="A name of `expunge list suites`, or a folder with suite.toml, cases.csv.")
    ],
    target: Annotated[
        list[str] | None, typer.Option(help="Whose cases; repeat. Default: what DIR erased, or the whole suite.")
    ] = None,
    detector: Annotated[
        list[str] | None, typer.Option(help="A name of `expunge list detectors`; repeat. Default: the suite's own.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for a bare model; DIR is filled in place.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder that keeps the base model's images for other runs.")
    ] = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Draw a suite's prompts, judge the images, and print rates with intervals beside the base model's.

    Running it again continues where it stopped. Sampler, seeds and detectors are the suite's.
    """
    screen, found = Out(machine=json), place(source)
    folder = _folder(found, suite, out)
    summaries = measure(
        screen, found, folder, suite, targets=target or (), detectors=detector or (), device=device, cache=cache
    )
    screen.emit({"run": str(folder), "suites": as_data(summaries)})
    show(screen, summaries)
    screen.say(f"wrote {folder / 'summary.json'}; a page of it: expunge report {folder}")


def _folder(found: Place, suite: str, out: Path | None) -> Path:
    if found.run is None:
        return out or Path("runs") / f"{Path(found.model).name}-{Path(suite).name}"
    if out is not None and out != found.run:
        raise InputError(f"--out {out} is for bare models; {found.run} is filled in place")
    return found.run
