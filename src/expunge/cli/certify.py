"""`expunge certify`: what may be said about how much of a concept is left."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.console import Out
from expunge.cli.options import Device, Json, Seed
from expunge.cli.places import place
from expunge.core.errors import InputError
from expunge.leakage.twins import Level
from expunge.report import words
from expunge.suites.load import Suite, catalogue, load

if TYPE_CHECKING:
    from expunge.leakage.record import LeakageCertificate

FAILED_CONTROL = 3
Lines = Annotated[
    Path | None, typer.Option(dir_okay=False, help="Sentences with one {}, one a line, in place of the default ones.")
]
Floor = Annotated[
    float,
    typer.Option(
        help="U-Nets: draw by the ancestral sampler, each step noisy by at least this deviation of the latents, for "
        "example 0.05. Default: the model's own sampler."
    ),
]


def certify(
    source: Annotated[str, typer.Argument(metavar="DIR", help="The folder that `expunge erase` wrote.")],
    concept: Annotated[str, typer.Option(help="Which of the erased concepts.")],
    level: Annotated[
        Level,
        typer.Option(
            help="Twin prompts: quick 250, standard 1000, audit 5000 (more than suites' words make: needs --prompts)."
        ),
    ] = "standard",
    suite: Annotated[
        str,
        typer.Option(help="Gives synonyms, sampler and detectors. Default: the packaged suite that has the concept."),
    ] = "",
    anchor: Annotated[
        str, typer.Option(help="What the twins ask for. Default: where the concept was sent, or the suite's anchor.")
    ] = "",
    prompts: Lines = None,
    detector: Annotated[
        list[str] | None, typer.Option(help="A name of `expunge list detectors`; repeat. Default: the suite's own.")
    ] = None,
    path: Annotated[
        bool, typer.Option("--path", help="Ask for the path-KL bound; needs noise in each step: --noise-floor.")
    ] = False,
    noise_floor: Floor = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Measure what is left of a concept, with its controls, and print the sentences that follow.

    Five arms of pictures are drawn; running it again continues. Results of `expunge attack` in the same folder become
    rows, and a gate's misses are counted. Exit code 3 if a control failed: then the only verdict is INVALID.
    """
    screen, found = Out(machine=json), place(source)
    folder = found.one
    if folder is None:
        raise InputError(f"{source} holds no artifact to certify; make one with expunge erase")
    chosen, lines = _suite(suite, concept), _lines(prompts)
    with screen.waiting("loading torch and diffusers"):
        from expunge.core.eraser import Run
        from expunge.stages.leakage import Question, leakage

    question = Question(
        concept=concept,
        level=level,
        suite=chosen,
        anchor=anchor,
        prompts=lines,
        detectors=tuple(detector or ()),
        path=path,
        noise_floor=noise_floor,
        seed=seed,
    )
    with screen.progress() as progress:
        certificate = leakage(folder, question, Run(seed=seed, device=device, progress=progress))
    _show(screen, certificate)
    if certificate.controls.failed:
        raise typer.Exit(FAILED_CONTROL)


def _suite(name: str, concept: str) -> Suite:
    if name:
        return load(name)
    known = [suite for suite in map(load, catalogue()) if concept in {t.concept.name for t in suite.targets}]
    if not known:
        raise InputError(f"no packaged suite has the target {concept!r}; name one with --suite")
    return known[0]


def _lines(file: Path | None) -> tuple[str, ...]:
    if file is None:
        return ()
    if not file.is_file():
        raise InputError(f"no such file: {file}")
    return tuple(file.read_text(encoding="utf-8").splitlines()) or ("",)


def _show(screen: Out, found: "LeakageCertificate") -> None:
    screen.emit(found.data())
    for verdict in found.verdicts:
        screen.say(verdict.text)
    for line in found.controls.failed:
        screen.note(f"control failed: {line}")
    if found.path is not None:
        row = found.path
        screen.note(f"path-KL: {words.path(row.I_hi, row.base_ratio, vacuous=row.vacuous)}")
    scope = found.scope
    screen.note(
        f"about {scope.concept!r} against {scope.anchor!r}, erased with {scope.method}, {scope.n_prompts} prompts "
        f"{scope.prompts_hash[:12]}, {scope.sampler}, guidance {scope.cfg:g}"
    )
