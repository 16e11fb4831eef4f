"""`expunge compose` and `expunge undo`: artifacts → an artifact of all their erasures, or of all but some."""

import json as json_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.console import Out
from expunge.cli.erase import outcome
from expunge.cli.options import MODELS, Device, Json, OutDir, Provenance
from expunge.cli.places import place
from expunge.models._names import settled

Base = Annotated[str | None, typer.Option(help=f"Another base, with the same text encoder and layers. {MODELS}")]


def compose(
    sources: Annotated[list[str], typer.Argument(metavar="DIR…", help="What `expunge erase` wrote, in this order.")],
    out: OutDir,
    base: Base = None,
    provenance: Provenance = True,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Make one artifact of several closed-form ones; with one and --base, put it onto another model."""
    screen = Out(machine=json)
    folders = [place(source).one or Path(source) for source in sources]
    with screen.waiting("loading torch and diffusers"):
        from expunge.core.eraser import Run
        from expunge.stages import sequel as stage
    with screen.progress() as progress:
        run, name = Run(device=device, progress=progress), settled(base) if base else None
        folder, order = stage.compose(folders, out, run, base=name, recorded=provenance)
    _tell(screen, folder, order)


def undo(
    source: Annotated[str, typer.Argument(metavar="DIR", help="An artifact of several erasures.")],
    target: Annotated[list[str], typer.Option(help="Concept to take out again, by name; repeat for several.")],
    out: OutDir,
    provenance: Provenance = True,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Take an erased concept out of a closed-form artifact, as if it had never been erased, or say why not."""
    screen, found = Out(machine=json), place(source)
    with screen.waiting("loading torch and diffusers"):
        from expunge.core.eraser import Run
        from expunge.stages import sequel as stage
    with screen.progress() as progress:
        run = Run(device=device, progress=progress)
        folder, order = stage.undo(found.one or Path(source), target, out, run, recorded=provenance)
    _tell(screen, folder, order)


def _tell(screen: Out, folder: Path, order: Sequence[Mapping[str, Any]]) -> None:
    from expunge.stages.artifact import read_card

    card = read_card(folder)
    screen.emit(
        {
            "artifact": str(folder),
            "card": json_module.loads(card.to_json()),
            "order": [dict(step) for step in order],
        }
    )
    screen.say(outcome(card))
    for step in order:
        screen.say(_step(step))
    for certificate in card.certificates or ():
        screen.say(f"{certificate.name}: {certificate.statement}")
    screen.say(f"wrote {folder}")


def _step(step: Mapping[str, Any]) -> str:
    """Say how one step of the edit came about, and whether its place matters."""
    names = ", ".join(step["targets"])
    if step["bound"]:
        how = f"{names}: computed from the weights before it"
    else:
        how = f"{names}: solved together, in any order" if step["joint"] else f"{names}: solved alone"
    if step["commutator"] is None:
        return how
    return f"{how}; after the step above, other order: {step['commutator']:.2g} of the change of both"
