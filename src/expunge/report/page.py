"""The page: findings and views poured into one template."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from expunge import __version__
from expunge.report import leakage, views, words
from expunge.report.read import BASE, Findings, Suite, read


def render(folder: Path) -> str:
    """Return report.html of a run folder as text: styles, plots and pictures inside, no request to anywhere.

    Raises InputError if the folder was not scored and summarized.
    """
    findings = read(folder)
    reconstructed = [arm for arm, card in findings.cards.items() if card.claims.get("reconstruction")]
    environment = Environment(
        loader=PackageLoader("expunge.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=title(findings),
        model=findings.model,
        version=__version__,
        suites=[_suite(suite, reconstructed) for suite in findings.suites],
        leakage=leakage.sections(findings.leakage),
        not_said=words.NOT_SAID,
        changes=views.changes(findings),
        methods=views.methods(findings.cards),
        attacks=views.attacks(findings),
        licences=views.licences(findings),
        limits=words.LIMITS,
        reconstruction=words.RECONSTRUCTION,
        reconstructed=reconstructed,
    )


def title(findings: Findings) -> str:
    """Name the page: what was erased, and how many ways it was tried."""
    erased = [c.name for card in findings.cards.values() for c in card.target]
    targets = list(dict.fromkeys(erased)) or list(findings.suites[0].summary.targets)
    names = words.listed([f"“{name}”" for name in targets[:3]]) + (" and more" if len(targets) > 3 else "")
    count = len([arm for arm in findings.suites[0].arms if arm != BASE])
    ways = {0: "before erasing", 1: f"erased with {next(iter(findings.cards), '')}"}
    numbers = ("two", "three", "four", "five", "six")
    return f"{names}, {ways.get(count) or f'erased {_number(count, numbers)} ways'}"


def _number(count: int, numbers: Sequence[str]) -> str:
    return numbers[count - 2] if count - 2 < len(numbers) else str(count)


def _suite(suite: Suite, reconstructed: Sequence[str]) -> dict[str, object]:
    return {
        "name": suite.summary.suite,
        "digest": suite.summary.suite_sha256[:12],
        "cases": len(suite.cases),
        "steps": suite.steps,
        "guidance": f"{suite.guidance_scale:g}",
        "detectors": suite.detectors,
        "arms": suite.arms,
        "legend": views.legend(suite),
        "targets": [(target, views.parts(suite, target)) for target in suite.summary.targets[:12]],
        "glance": views.glance(suite),
        "plots": views.plots(suite, reconstructed),
        "table": views.table(suite),
    }
