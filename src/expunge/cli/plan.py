"""`expunge plan`: a model's shape and a method → what would change, how large it would be, what it would take."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.console import Out
from expunge.cli.erase import Checkpointing, DropEncoders, Dtype
from expunge.cli.options import Json
from expunge.models._names import settled, shape_names

if TYPE_CHECKING:
    from expunge.stages._rehearsal import Held
    from expunge.stages.plan import Plan, Site

SHAPES = ", ".join(shape_names())


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=f"A published shape ({SHAPES}), a name of `expunge list models`, or a local diffusers folder.",
        ),
    ],
    method: Annotated[str, typer.Option(help="A name of `expunge list methods`.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the method; repeat.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the exports lora and kohya.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the base model.")] = "float32",
    checkpointing: Checkpointing = False,
    drop_encoders: DropEncoders = False,
    names: Annotated[bool, typer.Option("--names", help="Name every tensor that changes, one a line.")] = False,
    json: Json = False,
) -> None:
    """Say what a method would change in a model, how large its files would be, and the memory it would take.

    No weight is read or made: of a folder only the configurations are needed.
    """
    screen = Out(machine=json)
    with screen.waiting("rehearsing without weights"):
        from expunge.core.registry import find
        from expunge.stages import plan as stage
        from expunge.stages.recipe import settings as parsed

        options = parsed(find("methods", method), settings or [])
        place = model if model in shape_names() else settled(model)
        rehearse = partial(stage.plan, checkpointing=checkpointing, drop_encoders=drop_encoders)
        found = rehearse(place, method, options, dtype=dtype, rank=rank)
    screen.emit({**asdict(found), "peak": found.peak})
    screen.say(_title(found))
    if names:
        screen.table(("tensor", "shape"), [(site.path, _shape(site.shape)) for site in found.sites])
    else:
        screen.table(("tensors", "shape", "how many"), list(_grouped(found.sites)))
    screen.say("")
    screen.table(("file", "size", ""), list(_files(found)))
    screen.say("")
    screen.table(("memory at the fullest moment", "size"), list(_memory(found.erasing)))
    screen.say(f"{_size(found.loading)} while the model is loaded")
    screen.say(f"{_size(found.saving)} while the result is certified and written, on the host")
    screen.say("beside that, Python and its libraries take about half a GB")


def _title(found: "Plan") -> str:
    change = f"{len(found.sites)} tensors, {found.parameters:,} numbers, {100 * found.share:.2f} % of the parameters"
    if not found.sites:
        change = f"no tensor; the guard stores {len(found.stored)}"
    return f"{found.method} on {found.model} ({found.family}, {found.dtype}) changes {change}"


def _grouped(sites: Sequence["Site"]) -> Iterator[tuple[str, str, str]]:
    """Sites whose names differ in block numbers only, and whose shapes do not, as one row."""
    groups: dict[tuple[str, str], int] = {}
    for site in sites:
        row = (re.sub(r"\.\d+(?=\.)", ".*", site.path), _shape(site.shape))
        groups[row] = groups.get(row, 0) + 1
    for (name, shape), count in groups.items():
        yield name, shape, str(count)


def _files(found: "Plan") -> Iterator[tuple[str, str, str]]:
    yield "artifact", _size(found.artifact), found.kind if found.exact else f"{found.kind}; depends on the prompts"
    for export in found.exports:
        rank = "" if export.rank is None else f"rank {export.rank}{', at most' if export.at_most else ''}"
        yield f"export {export.format}", _size(export.bytes), rank


def _memory(held: "Held") -> Iterator[tuple[str, str]]:
    rows = {
        "weights": held.weights,
        "trainable copy": held.trainable,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "activations and the rest": held.rest,
        "freed, and kept by the allocator": held.kept,
        "together": held.total,
    }
    yield from ((name, _size(count)) for name, count in rows.items() if count)


def _shape(sides: Sequence[int]) -> str:
    return " × ".join(map(str, sides))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
