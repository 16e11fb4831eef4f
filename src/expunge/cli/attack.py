"""`expunge attack`: can an erased concept be brought back?"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.console import Out
from expunge.cli.options import Device, Json, Seed
from expunge.core.errors import InputError
from expunge.core.registry import catalogue


def attack(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that `expunge erase` wrote.")],
    name: Annotated[str, typer.Option("--attack", help="A name of `expunge list attacks`. Required.")] = "",
    concept: Annotated[str | None, typer.Option(help="Which erased concept; needed where there are several.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the attack; repeat.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Whose prompts, seeds and detectors. Default: the package's that has the concept."),
    ] = None,
    cases: Annotated[int, typer.Option(help="Prompts to win; more take longer and narrow the intervals.")] = 10,
    base: Annotated[str | None, typer.Option(help="Where the base model is, if it moved.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Try to bring an erased concept back, beside the controls that say what success would mean.

    The attack sees the model as its user has it. Its result, attacks/NAME.json, holds counts, never what it found.
    """
    if not name:
        raise InputError(f"Missing option --attack; legal: {', '.join(sorted(catalogue('attacks')))}")
    screen = Out(machine=json)
    with screen.waiting("loading torch and diffusers"):
        from expunge.core.eraser import Run
        from expunge.stages._outcomes import load
        from expunge.stages.attack import attack as stage
    with screen.progress() as progress:
        file = stage(
            source,
            name,
            Run(seed=seed, device=device, progress=progress),
            options=settings or (),
            concept=concept,
            suite=suite,
            base=base,
            cases=cases,
        )
    outcome = load(file)
    screen.emit({"file": str(file), "outcome": asdict(outcome), "sentence": outcome.sentence})
    screen.say(outcome.sentence)
    screen.say(f"wrote {file}")
