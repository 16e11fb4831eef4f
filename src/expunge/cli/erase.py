"""`expunge erase`: flags → recipe → artifact."""

from collections.abc import Sequence
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from expunge.cli.console import Out
from expunge.cli.options import Device, Json, ModelName, OutDir, Seed, phrases
from expunge.core.card import Card
from expunge.core.concept import Kind
from expunge.core.errors import InputError

if TYPE_CHECKING:
    from expunge.stages.recipe import Recipe

Dtype = Literal["float32", "float16", "bfloat16"]
PHRASES = "'NAME | OTHER PHRASE | …' gives more phrases."


def erase(
    model: ModelName,
    target: Annotated[list[str], typer.Option(help=f"Concept to erase; repeat for several. {PHRASES}")],
    method: Annotated[str, typer.Option(help="A name of `expunge list methods`.")],
    out: OutDir,
    anchor: Annotated[
        list[str] | None,
        typer.Option(help='What the target is sent to, one per target in order; "" or absent: the unconditional.'),
    ] = None,
    retain: Annotated[list[str] | None, typer.Option(help=f"Concept that must not move; repeat. {PHRASES}")] = None,
    kind: Annotated[Kind, typer.Option(help="What the targets are.")] = "object",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the method; repeat.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Precision of the base model.")] = "float32",
    json: Json = False,
) -> None:
    """Erase concepts from a model and write the change as an artifact."""
    screen, targets, kept = (
        Out(machine=json),
        [phrases(text) for text in target],
        [phrases(text) for text in retain or []],
    )
    with screen.waiting("loading torch and diffusers"):
        from expunge.stages.artifact import read_card

        recipe = build(
            model=model,
            targets=targets,
            anchors=anchor or [],
            retain=kept,
            kind=kind,
            method=method,
            settings=settings or [],
            seed=seed,
            dtype=dtype,
        )
    folder = carry_out(screen, recipe, out, device=device)
    card = read_card(folder)
    screen.emit({"artifact": str(folder), "card": loads(card.to_json())})
    screen.say(outcome(card))
    screen.say(f"wrote {folder}")


def build(
    *,
    model: str,
    targets: Sequence[tuple[str, ...]],
    anchors: Sequence[str],
    retain: Sequence[tuple[str, ...]],
    kind: Kind,
    method: str,
    settings: Sequence[str],
    seed: int,
    dtype: Dtype = "float32",
) -> "Recipe":
    """Make a recipe of plain words; anchors are phrases in the order of the targets, "" for the unconditional.

    Raises InputError for an unknown method, an illegal setting, or anchors that do not pair up.
    """
    from expunge.core.registry import find
    from expunge.stages import recipe

    if anchors and len(anchors) != len(targets):
        raise InputError(f"got {len(targets)} --target and {len(anchors)} --anchor; give one anchor each, or none")
    options = recipe.settings(find("methods", method), settings)
    sent = [recipe.ConceptEntry(name=names[0], prompts=names) if (names := _anchor(text)) else None for text in anchors]
    return recipe.Recipe(
        seed=seed,
        model=recipe.ModelChoice(name=model, dtype=dtype),
        method=recipe.MethodChoice(name=method, options=options),
        target=tuple(
            recipe.TargetEntry(name=names[0], kind=kind, prompts=names, anchor=anchor)
            for names, anchor in zip(targets, sent or [None] * len(targets), strict=True)
        ),
        retain=tuple(recipe.ConceptEntry(name=names[0], prompts=names) for names in retain),
    )


def _anchor(text: str) -> tuple[str, ...]:
    return phrases(text) if text.strip() else ()


def carry_out(screen: Out, recipe: "Recipe", out: Path, *, device: str) -> Path:
    """Run the erase stage with a progress bar; return the artifact's folder."""
    from expunge.core.eraser import Run
    from expunge.stages.erase import erase as stage

    with screen.progress() as progress:
        return stage(recipe, out, Run(seed=recipe.seed, device=device, progress=progress))


def outcome(card: Card) -> str:
    """Say in one line what an artifact changes."""
    names = ", ".join(concept.name for concept in card.target)
    share, size = 100 * card.patch.share, card.patch.bytes / 1e6
    return (
        f"{card.method} erased {names} from {card.base.name}: {len(card.patch.layers)} tensors, "
        f"{share:.2f} % of the parameters, {size:.2f} MB, {card.run.seconds:.1f} s"
    )
