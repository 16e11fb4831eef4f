"""`expunge purify`: a real picture → the same without what was erased."""

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.console import Out
from expunge.cli.options import Device, Json, OutDir


def purify(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that `expunge erase` wrote.")],
    image: Annotated[Path, typer.Option(help="The picture; it is scaled to the model's size.")],
    prompt: Annotated[str, typer.Option(help="What the picture shows, the erased concept included.")],
    out: OutDir,
    depth: Annotated[float, typer.Option(help="How far up into the noise, above 0 to 1: 1 keeps least.")] = 0.8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the walk up, and of the walk down.")] = 50,
    guidance: Annotated[float, typer.Option(help="w in u + w (c - u) on the way down.")] = 4.0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Take an erased concept out of a real picture: up into noise by the model as it was, down by the erased one."""
    screen = Out(machine=json)
    with screen.waiting("loading torch and diffusers"):
        from expunge.core.eraser import Run
        from expunge.stages.purify import purify as stage
    with screen.progress() as progress:
        run = Run(device=device, progress=progress)
        before, after = stage(source, image, prompt, out, run, guidance_scale=guidance, steps=steps, depth=depth)
    screen.emit({"before": str(before), "after": str(after)})
    screen.say(f"wrote {before} (the base model's walk) and {after}")
