"""`expunge demo`: one concept, three erasers, one page."""

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.console import Out
from expunge.cli.cut import cut_suite
from expunge.cli.erase import build, carry_out, outcome
from expunge.cli.measure import as_data, measure, show
from expunge.cli.options import Device, Json, Seed
from expunge.cli.places import place
from expunge.cli.report import write_page

METHODS = ("uce", "esd", "all_but_one")


def demo(
    model: Annotated[str, typer.Option(help="A name of `expunge list models`.")] = "emoji-unet",
    suite: Annotated[str, typer.Option(help="A name of `expunge list suites`, or a suite's folder.")] = "objects",
    target: Annotated[str, typer.Option(help="One of the suite's targets; the first one by default.")] = "",
    method: Annotated[list[str] | None, typer.Option(help=f"Repeat. Default: {', '.join(METHODS)}.")] = None,
    cases: Annotated[
        int, typer.Option(min=8, help="Images per model; more take longer and narrow the intervals.")
    ] = 100,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder to write.")] = Path("runs/demo"),
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Erase one concept with three methods at default settings, judge the results, and write a page about it.

    A killed demo continues where it stopped when it is started again.
    """
    screen = Out(machine=json)
    part, name = cut_suite(suite, target, cases, out / "suite")
    for choice in method or METHODS:
        screen.note(f"erasing {name} with {choice}")
        screen.note(_erase(screen, model, part, name, choice, out / choice, seed=seed, device=device))
    screen.note(f"drawing and judging {cases} images for each model")
    summaries = measure(screen, place(str(out)), out, part, targets=[name], device=device)
    page = write_page(out)
    screen.emit({"run": str(out), "suites": as_data(summaries), "report": str(page.resolve())})
    show(screen, summaries, first_detector=True)
    screen.say(f"\n{page.resolve()}")


def _erase(screen: Out, model: str, part: Path, name: str, method: str, out: Path, *, seed: int, device: str) -> str:
    from expunge.stages.artifact import read_card
    from expunge.suites.load import load

    target = load(part).target(name)
    recipe = build(
        model=model,
        targets=[target.concept.prompts],
        anchors=[target.anchor],
        retain=[concept.prompts for concept in target.retain],
        kind=target.concept.kind,
        method=method,
        settings=(),
        seed=seed,
    )
    return outcome(read_card(carry_out(screen, recipe, out, device=device)))
