"""The page's section on leakage: one picture, one plain sentence per verdict, and what none of it says."""

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from expunge.leakage.record import LeakageCertificate
from expunge.leakage.verdict import Verdict
from expunge.report import words
from expunge.report.plot import BASE, GONE, RULE, SOFT, STYLE, svg


def sections(found: Sequence[LeakageCertificate]) -> list[dict[str, object]]:
    """Describe each certificate of a run for the template."""
    return [
        {
            "title": f"“{each.scope.concept}” after {each.scope.method}",
            "arm": each.scope.method,
            "plot": "" if each.controls.failed else leakage_plot(each),
            "sentences": [(verdict.text, meaning(verdict, each)) for verdict in each.verdicts],
            "facts": _facts(each),
            "rows": [
                (row.name, _range(row.I_lo, row.I_hi), *(_share(row.corrected_rate_ci[arm]) for arm in _SHOWN))
                for row in each.detector
            ],
        }
        for each in found
    ]


_SHOWN = ("base-concept", "concept", "anchor")


def meaning(verdict: Verdict, certificate: LeakageCertificate) -> str:
    """Say a verdict in plain words, for somebody who has never heard of a bit."""
    failed = "; ".join(certificate.controls.failed)
    return words.VERDICTS[verdict.kind].format(
        concept=certificate.scope.concept, anchor=certificate.scope.anchor, failed=failed
    )


def leakage_plot(certificate: LeakageCertificate) -> str:
    """Plot bounds on a ruler from nothing (0) to everything (1 bit): bars are proven, the faint line is not excluded.

    A detector's row is closed on the right, because it is about that detector alone.
    """
    rows = [
        ("base model", certificate.controls.ceiling_bits, 1.0, BASE),
        ("erased model", certificate.leak_bits, 1.0, GONE),
        ("made of the concept", certificate.attribution.portfolio_bits, 1.0, GONE),
        *((f"seen by {row.name}", row.I_lo, row.I_hi, SOFT) for row in certificate.detector),
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.75 + 0.36 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for height, (_, low, high, tone) in enumerate(rows):
            axes.plot([low, high], [height, height], color=RULE, linewidth=5, solid_capstyle="butt")
            axes.plot([0, low], [height, height], color=tone, linewidth=9, solid_capstyle="butt")
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(-0.01, 1.01)
        axes.set_xticks([0, 0.5, 1], ["nothing", "half a bit", "everything"])
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.tick_params(axis="both", length=0)
        spoken = "; ".join(f"{name}: at least {low:.2g} bit, {_open(high)}" for name, low, high, _ in rows)
        return svg(figure, f"What pictures give away about {certificate.scope.concept}", spoken)


def _open(high: float) -> str:
    return "more is not excluded" if high >= 1 else f"at most {high:.2g} for this detector"


def _facts(found: LeakageCertificate) -> list[tuple[str, str]]:
    scope, controls = found.scope, found.controls
    limit = "none" if controls.spike_limit is None else words.per_cent(controls.spike_limit)
    row, paths = found.path, list[tuple[str, str]]()
    if row is not None:
        paths = [("Paths of the noisy sampler", words.path(row.I_hi, row.base_ratio, vacuous=row.vacuous))]
    return [
        ("Compared with", scope.anchor),
        ("Twin prompts", f"{scope.n_prompts}, {scope.tier}; hash {scope.prompts_hash[:12]}"),
        ("Sampler", f"{scope.sampler}, guidance {scope.cfg:g}"),
        ("Who looked", ", ".join(found.observers.split("+"))),
        ("Smallest share of leaks found 4 times in 5", limit),
        ("The base model, by the same means", f"{controls.ceiling_bits:.2g} bit or more"),
        *_coin(found),
        ("Two arms that are alike", f"p = {controls.null_p:.2g}"),
        ("Level", f"{found.design.level}, {100 * (1 - found.design.delta):.0f} % per sentence"),
        *paths,
    ]


def _coin(found: LeakageCertificate) -> list[tuple[str, str]]:
    eps = found.lower.equivalence
    return (
        [] if eps is None else [("The chosen head guesses right", f"50 % of the time, give or take {100 * eps:.2g} %")]
    )


def _range(low: float, high: float) -> str:
    return f"{low:.2g}–{high:.2g}"


def _share(ends: Sequence[float]) -> str:
    return f"{words.percent(ends[0])}–{words.percent(ends[1])}"
