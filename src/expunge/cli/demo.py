"""`expunge demo`: one concept, three erasers, one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.console import Out
from expunge.cli.cut import cut_suite
from expunge.cli.erase import build, carry_out, outcome
from expunge.cli.measure import as_data, measure, show
from expunge.cli.options import Device, Json, Provenance, Seed
from expunge.cli.places import place
from expunge.cli.report import write_page
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
    ] = 80,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="METHOD.FIELD=VALUE", help="Set a field of a method; repeat.")
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder to write.")] = Path("runs/demo"),
    seed: Seed = 0,
    provenance: Provenance = True,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Erase one concept with three methods at default settings, judge the results, and write a page about it.

    A killed demo continues where it stopped when it is started again.
    """
    from expunge.stages.artifact import read_card

    screen, methods = Out(machine=json), list(dict.fromkeys(method or METHODS))
    chosen = {choice: _settings(choice, settings or [], methods) for choice in methods}
    whole = load(suite)
    goal = whole.target(target or whole.targets[0].concept.name)
    recipes = {choice: _recipe(model, goal, choice, pairs, seed) for choice, pairs in chosen.items()}
    part, name = cut_suite(suite, goal.concept.name, cases, out / "suite")
    for choice, recipe in recipes.items():
        screen.note(f"erasing {name} with {choice}")
        folder = carry_out(screen, recipe, out / choice, device=device, recorded=provenance)
        screen.note(outcome(read_card(folder)))
    screen.note(f"drawing and judging {len(load(part).cases)} images for each model")
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
