"""`expunge demo`: one concept, three erasers, one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.console import Out
from expunge.cli.cut import cut_suite
from expunge.cli.erase import build, carry_out, outcome
from expunge.cli.measure import as_data, measure, show
from expunge.cli.options import Device, Json, Seed
from expunge.cli.places import place
from expunge.cli.report import write_page
from expunge.core.card import Card
from expunge.core.errors import InputError
from expunge.suites.load import Target, load

if TYPE_CHECKING:
    from expunge.stages.recipe import Recipe

METHODS = ("uce", "esd", "all_but_one")


def demo(
    model: Annotated[str, typer.Option(help="A name of `expunge list models`.")] = "emoji-unet",
    suite: Annotated[str, typer.Option(help="A name of `expunge list suites`, or a suite's folder.")] = "objects",
    target: Annotated[str, typer.Option(help="One of the suite's targets; the first one by default.")] = "",
    method: Annotated[list[str] | None, typer.Option(help=f"Repeat. Default: {', '.join(METHODS)}.")] = None,
    cases: Annotated[
        int, typer.Option(min=8, help="Images per model; more take longer and narrow the intervals.")
    ] = 100,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="METHOD.FIELD=VALUE", help="Set a field of a method; repeat.")
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder to write.")] = Path("runs/demo"),
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Erase one concept with three methods at default settings, judge the results, and write a page about it.

    A killed demo continues where it stopped when it is started again.
    """
    screen, methods = Out(machine=json), list(dict.fromkeys(method or METHODS))
    chosen = {choice: _settings(choice, settings or [], methods) for choice in methods}
    part, name = cut_suite(suite, target, cases, out / "suite")
    for choice, pairs in chosen.items():
        screen.note(f"erasing {name} with {choice}")
        recipe = _recipe(model, load(part).target(name), choice, pairs, seed)
        screen.note(outcome(_erased(screen, recipe, out / choice, device)))
    screen.note(f"drawing and judging {cases} images for each model")
    summaries = measure(screen, place(str(out)), out, part, targets=[name], device=device)
    page = write_page(out)
    screen.emit({"run": str(out), "suites": as_data(summaries), "report": str(page.resolve())})
    show(screen, summaries, first_detector=True)
    screen.say(f"\n{page.resolve()}")


def _settings(method: str, pairs: Sequence[str], methods: Sequence[str]) -> list[str]:
    for pair in pairs:
        if pair.partition(".")[0] not in methods:
            raise InputError(f"--set {pair!r} names none of the methods {', '.join(methods)}; write METHOD.FIELD=VALUE")
    return [pair.removeprefix(f"{method}.") for pair in pairs if pair.startswith(f"{method}.")]


def _recipe(model: str, target: Target, method: str, settings: Sequence[str], seed: int) -> "Recipe":
    return build(
        model=model,
        targets=[target.concept.prompts],
        anchors=[target.anchor],
        retain=[concept.prompts for concept in target.retain],
        kind=target.concept.kind,
        method=method,
        settings=settings,
        seed=seed,
    )


def _erased(screen: Out, recipe: "Recipe", out: Path, device: str) -> Card:
    from expunge.stages.artifact import read_card

    return read_card(carry_out(screen, recipe, out, device=device))
