"""`expunge erase`: flags → recipe → artifact."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import typer

from expunge.cli.console import Out
from expunge.cli.options import MODELS, Device, Json, OutDir, Provenance, Seed, phrases
from expunge.cli.places import Place, place
from expunge.core.card import Card
from expunge.core.concept import Kind
from expunge.core.errors import InputError
from expunge.models._names import settled
from expunge.report import words

if TYPE_CHECKING:
    from expunge.stages.recipe import ModelChoice, Recipe

Word = TypeVar("Word", bound=Sequence[Any])
Dtype = Literal["float32", "float16", "bfloat16"]
On = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Erase from what this closed-form artifact leaves; it need not name MODEL."),
]
RecipeFile = Annotated[
    Path | None, typer.Option(help="Repeat the run of a recipe.toml, in place of every word about what to erase.")
]
Budget = Annotated[
    float | None,
    typer.Option(
        help="End a training before what should stay has moved by this share of what the target means to MODEL."
    ),
]
Accumulate = Annotated[
    int | None, typer.Option(min=1, help="Losses whose gradients are added up before each step of a training.")
]
Preview = Annotated[
    int, typer.Option(min=0, metavar="STEPS", help="Draw a grid of pictures every so many steps of a training.")
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Compute activations again for gradients: less memory, more time.")
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep text encoders and autoencoder in main memory until they are used.")
]
DropEncoders = Annotated[
    bool, typer.Option("--drop-encoders", help="Encode the method's prompts first, then train without text encoders.")
]
PHRASES = "'NAME | OTHER PHRASE | …' gives more phrases."


def erase(
    out: OutDir,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODELS)] = "",
    target: Annotated[
        list[str] | None, typer.Option(help=f"Concept to erase; repeat for several. Required. {PHRASES}")
    ] = None,
    method: Annotated[str, typer.Option(help="A name of `expunge list methods`. Required.")] = "",
    anchor: Annotated[
        list[str] | None,
        typer.Option(help='What the target is sent to, one per target in order; "" or absent: the unconditional.'),
    ] = None,
    retain: Annotated[list[str] | None, typer.Option(help=f"Concept that must not move; repeat. {PHRASES}")] = None,
    kind: Annotated[Kind, typer.Option(help="What the targets, anchors and retained concepts are.")] = "object",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the method; repeat.")
    ] = None,
    seed: Seed = 0,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the base model.")] = "float32",
    on: On = None,
    budget: Budget = None,
    accumulate: Accumulate = None,
    preview: Preview = 0,
    recipe: RecipeFile = None,
    checkpointing: Checkpointing = False,
    offload: Offload = False,
    drop_encoders: DropEncoders = False,
    provenance: Provenance = True,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Erase concepts from a model and write the change as an artifact."""
    leads = os.environ.get("RANK", "0") == "0"  # as `accelerate launch` numbers its processes; the others are silent
    screen, before = Out(machine=json or not leads), place(on) if on else None
    targets, kept = ([phrases(text) for text in words or []] for words in (target, retain))
    with screen.waiting("loading torch and diffusers"):
        from expunge.stages.recipe import read

        if recipe is not None:
            _alone(model, targets, method, anchor, kept, settings, seed, on, kind != "object", dtype != "float32")
            _alone(budget, accumulate)
            asked = read(recipe)
        else:
            asked = build(
                on=before,
                model=_named("argument MODEL", model or (before.model if before else "")),
                targets=_named("option --target", targets),
                anchors=anchor or [],
                retain=kept,
                kind=kind,
                method=_named("option --method", method),
                settings=settings or [],
                seed=seed,
                dtype=dtype,
                budget=budget,
                accumulate=accumulate,
            )
    run = partial(carry_out, screen, asked, out, device=device, recorded=provenance, preview=preview)
    folder = run(checkpointing=checkpointing, offload=offload, drop_encoders=drop_encoders)
    if leads:
        _tell(screen, folder)


def _tell(screen: Out, folder: Path) -> None:
    from expunge.stages.artifact import read_card

    card = read_card(folder)
    screen.emit({"artifact": str(folder), "card": loads(card.to_json())})
    screen.say(outcome(card))
    for certificate in card.certificates or ():
        screen.say(f"{certificate.name}: {certificate.statement}")
    screen.say(f"wrote {folder}")


def _after(choice: "ModelChoice", before: Place) -> "ModelChoice":
    """Let a model be erased from what an artifact leaves, in the precision it was made in."""
    if before.one is None:
        raise InputError(f"--on {before.model} is a model; name the folder that an erasure wrote")
    if choice.dtype not in ("float32", before.dtype):
        raise InputError(f"--dtype {choice.dtype}, but {before.one} was made in {before.dtype}; legal: that")
    return replace(choice, on=str(before.one.resolve()), dtype=cast(Dtype, before.dtype))


def _named(what: str, value: Word) -> Word:
    if not value:
        raise InputError(f"Missing {what}; or repeat a run with --recipe FILE")
    return value


def _alone(*words: object) -> None:
    """Refuse words that a recipe would silently overrule."""
    if any(words):
        raise InputError(
            "--recipe says everything about the run; beside it only --out, --device, --checkpointing, --offload, "
            "--drop-encoders, --preview, --no-provenance"
        )


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
    on: Place | None = None,
    budget: float | None = None,
    accumulate: int | None = None,
) -> "Recipe":
    """Make a recipe of plain words; anchors are phrases in the order of the targets, "" for the unconditional.

    Raises InputError for an unknown method, an illegal setting, or anchors that do not pair up.
    """
    from expunge.core.registry import find
    from expunge.stages import recipe

    if anchors and len(anchors) != len(targets):
        raise InputError(f"got {len(targets)} --target and {len(anchors)} --anchor; give one anchor each, or none")
    options = recipe.settings(find("methods", method), settings)
    entry = partial(recipe.ConceptEntry, kind=kind)  # what replaces a style is a style, and so are its neighbours
    sent = [entry(name=names[0], prompts=names) if (names := _anchor(text)) else None for text in anchors]
    choice = recipe.ModelChoice(name=settled(model), dtype=dtype)
    return recipe.Recipe(
        seed=seed,
        budget=budget,
        accumulate=accumulate,
        model=_after(choice, on) if on else choice,
        method=recipe.MethodChoice(name=method, options=options),
        target=tuple(
            recipe.TargetEntry(name=names[0], kind=kind, prompts=names, anchor=anchor)
            for names, anchor in zip(targets, sent or [None] * len(targets), strict=True)
        ),
        retain=tuple(entry(name=names[0], prompts=names) for names in retain),
    )


def _anchor(text: str) -> tuple[str, ...]:
    return phrases(text) if text.strip() else ()


def carry_out(
    screen: Out,
    recipe: "Recipe",
    out: Path,
    *,
    device: str,
    recorded: bool = True,
    checkpointing: bool = False,
    offload: bool = False,
    drop_encoders: bool = False,
    preview: int = 0,
) -> Path:
    """Run the erase stage, seen live, after saying what will be ignored; return the artifact's folder."""
    from expunge.core.eraser import Run
    from expunge.stages._team import together
    from expunge.stages.erase import erase as stage

    eraser, request = recipe.eraser(), recipe.request()
    if any(request.anchor) and not eraser.uses_anchor:
        screen.note(f"{recipe.method.name} uses no anchor: --anchor has no effect")
    if request.retain and not eraser.retains:
        screen.note(f"{recipe.method.name} uses no retained concepts at these settings: --retain has no effect")
    with screen.live() as live, together(device) as team:
        run = Run(seed=recipe.seed, device=device, progress=live.progress, log=live.log, team=team)
        heavy = {"checkpointing": checkpointing, "offload": offload, "drop_encoders": drop_encoders}
        return stage(recipe, out, run, recorded=recorded, **heavy, preview=preview, show=live.picture)


def outcome(card: Card) -> str:
    """Say in one line what an artifact changes."""
    names = ", ".join(concept.name for concept in card.target)
    share, size = 100 * card.patch.share, card.patch.bytes / 1e6
    return (
        f"{card.method} erased {names} from {card.base.name}: {len(card.patch.layers)} tensors, "
        f"{share:.2f} % of the parameters, {size:.2f} MB, {words.span(card.run.seconds)}"
    )
