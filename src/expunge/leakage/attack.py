"""A-certificate: how often a fixed attack within a fixed budget succeeds, from the counts of `expunge attack`.

Source: certificates.md, section 5.
"""

from collections.abc import Sequence

from expunge.core.errors import InputError
from expunge.core.outcome import Budget, Outcome
from expunge.leakage.lower import most_rate
from expunge.leakage.record import AttackRow
from expunge.ops.stats import clopper_pearson


def about(outcomes: Sequence[Outcome], concept: str, patch_sha256: str, base_sha256: str) -> tuple[Outcome, ...]:
    """Keep the results on a concept whose attack passes through the artifact's guard, if there is one.

    An attack that walks around a guard says nothing about it. Raises InputError for a result on another patch or base.
    """
    found = [each for each in outcomes if each.concept == concept]
    for each in found:
        for what, got, want in (("patch", each.patch_sha256, patch_sha256), ("base", each.base_sha256, base_sha256)):
            if got != want:
                raise InputError(
                    f"attack {each.attack!r} was run on {what} {got[:12]!r}, not {want[:12]!r}: move its result away"
                )
    return tuple(each for each in found if each.adaptive)


def attack_rows(outcomes: Sequence[Outcome], delta: float) -> tuple[AttackRow, ...]:
    """Give every attack's rate with exact ends at delta over their number, so that the worst of them holds too."""
    return tuple(attack_row(each, delta / len(outcomes)) for each in outcomes)


def attack_row(outcome: Outcome, delta: float) -> AttackRow:
    """Give one attack's rate: prompts won untouched or by the attack, each one trial whatever its pictures.

    Of several detectors the one that saw the most: its end is above every detector's rate with 1 - delta, since it is
    at least the end of the detector whose true rate is the largest.
    """
    won = {name: round(rate.value * rate.n) for name, rate in outcome.asr.items()}
    judge = max(won, key=lambda name: won[name])
    hits, n = won[judge], outcome.asr[judge].n
    exact = clopper_pearson(hits, n, 1 - delta)
    return AttackRow(
        name=outcome.attack,
        budget=_spent(outcome.budget),
        N=n,
        k=outcome.k,
        successes=hits,
        ci=(exact.low, exact.high),
        success_hi=most_rate(hits, n, delta),
        null_rate=outcome.arms["null"].rates[judge].value,
        lift=outcome.lift[judge],
    )


def _spent(budget: Budget) -> str:
    """The budget as one word of a verdict: over all prompts together."""
    return f"{budget.gradients}-gradients+{budget.images_judged}-pictures"
