"""`expunge export`: an artifact → the file another tool loads."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.console import Out
from expunge.cli.options import MODELS, Device, Json
from expunge.cli.places import place

if TYPE_CHECKING:
    from expunge.stages.export import Exported

WORST = 5


def export(
    source: Annotated[str, typer.Argument(metavar="DIR", help="The folder that `expunge erase` wrote.")],
    to: Annotated[
        str, typer.Option(help="lora (diffusers), kohya (A1111, Forge, ComfyUI; U-Nets), comfy-diff, merged, pipeline.")
    ],
    rank: Annotated[
        int | None, typer.Option(help="Of lora and kohya. Default: what keeps the change up to 1e-3, at most 128.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File (.safetensors) or, for pipeline, folder. Default: below DIR/export.")
    ] = None,
    base: Annotated[str | None, typer.Option(help=f"Where the base model is, if it moved. {MODELS}")] = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Write an artifact as other tools load it: LoRA, full differences, checkpoint, or diffusers folder."""
    screen, found = Out(machine=json), place(source)
    with screen.waiting("loading torch and the base model"):
        from expunge.stages import export as stage

        done = stage.export(found.one or Path(source), to, out, rank=rank, base=base, device=device)
    screen.emit({**asdict(done), "path": str(done.path)})
    for note in done.notes:
        screen.note(f"NOTE: {note}")
    _losses(screen, done)
    screen.say(f"wrote {done.path}, {done.bytes / 1e6:.2f} MB")


def _losses(screen: Out, done: "Exported") -> None:
    """Say what the file keeps of the change; the worst layers by name where anything is lost."""
    if done.rank is None:
        return
    screen.say(f"rank {done.rank}, {len(done.layers)} layers, relative error {done.error:.2e}")
    worst = sorted(done.layers.items(), key=lambda item: -item[1])[:WORST]
    screen.table(("layer, worst first", "relative error"), [(path, f"{error:.2e}") for path, error in worst])
