"""Options that several commands share, and the small languages of their values."""

from pathlib import Path
from typing import Annotated

import typer

from expunge.core.errors import InputError

MODELS = (
    "A name of `expunge list models`, a local diffusers folder, FILE.safetensors@FOLDER, or hf:ORG/NAME from the hub."
)
ModelOrRun = Annotated[
    str, typer.Argument(metavar="MODEL|DIR", help="A model, or the folder that `expunge erase` wrote.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Seed = Annotated[int, typer.Option(min=0, help="Everything random follows from it.")]
Provenance = Annotated[
    bool, typer.Option("--provenance/--no-provenance", help="Name the code that ran, and its commit, in the card.")
]
OutDir = Annotated[Path, typer.Option("--out", file_okay=False, help="Folder to write.")]


def phrases(text: str) -> tuple[str, ...]:
    """Split `name | other phrase | …` into phrases, the name first; raises InputError for an empty one."""
    found = tuple(" ".join(part.split()) for part in text.split("|"))
    if not all(found):
        raise InputError(f"empty phrase in {text!r}; write NAME or 'NAME | OTHER PHRASE | …'")
    return found
