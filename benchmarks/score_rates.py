"""Rates, scores and counts of benchmarks.results_score, from rows of decisions and from outcomes of attacks."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import effect
from expunge.core.outcome import CONTROLS, Outcome
from expunge.core.records import Estimate
from expunge.ops.stats import Sample, clopper_pearson, harmonic_estimate, rate
from expunge.stages._panel import GLYPH

SPENT = ("gradients", "denoiser_forwards", "images_judged", "seconds")
Found = dict[str, Any]


def rates(found: list[Found]) -> dict[str, dict[str, Found]]:
    """Detector → arm → rates, with paraphrases, the harmonic score and the judge's confidence."""
    result = effect.plain([row for row in found if row["role"] != "paraphrase"])
    for detector, of_arm in result.items():
        for arm, held in of_arm.items():
            mine = [row for row in found if (row["detector"], row["arm"]) == (detector, arm)]
            held["paraphrase_rate"] = asdict(rate(sampled(mine, "paraphrase"), seed=0))
            held["harmonic"] = asdict(harmonic(mine, detector))
            held["confidence"] = asdict(rate(confidence(mine), seed=0))
    return result


def sampled(found: Iterable[Found], *roles: str) -> Sample:
    """Decisions of some roles, clustered by prompt."""
    mine = [row for row in found if row["role"] in roles]
    return Sample.of([row["fired"] for row in mine], [row["prompt"] for row in mine])


def harmonic(found: list[Found], detector: str) -> Estimate:
    """MACE's H_o with paraphrases counted among the synonyms: styles have none of the latter."""
    parts = (sampled(found, "target"), sampled(found, "retain"), sampled(found, "synonym", "paraphrase"))
    return harmonic_estimate(parts, (None, None, None), detector, seed=0)


def confidence(found: Iterable[Found]) -> Sample:
    """How sure a judge is of retained pictures: 1 / (1 + e^-margin), the asked concept against its best rival."""
    mine = [row for row in found if row["role"] == "retain"]
    sure = torch.sigmoid(torch.tensor([row["value"] for row in mine], dtype=torch.float64)).tolist()
    return Sample.of(sure, [row["prompt"] for row in mine])


def beside(ours: str, rival: str, found: list[Found], detector: str) -> Found:
    """Ours and a rival's harmonic score and confidence on the runs that neither refused."""
    of = {arm: [r for r in found if (r["detector"], r["arm"]) == (detector, arm)] for arm in (ours, rival)}
    both = {row["run"] for row in of[ours]} & {row["run"] for row in of[rival]}
    pair = [[row for row in of[arm] if row["run"] in both] for arm in (ours, rival)]
    if not both:
        return {"runs": 0}
    scores, sure = [harmonic(mine, detector).value for mine in pair], [confidence(mine).value for mine in pair]
    return {"runs": len(both), "harmonic": scores, "confidence": sure}


def won(held: list[Outcome]) -> Found:
    """One attack on several targets: arms, attack success rate and learning curves summed, what it spent averaged.

    The sign nobody drew is counted by its own filter, in every arm that was asked about it, and everything else by the
    outcomes' judge.
    """
    judge = held[0].judge
    sums: Found = {arm: summed([each.arms[arm].rates[judge] for each in held]) for arm in CONTROLS}
    sums["asr"] = summed([each.asr[judge] for each in held])
    curves = {"attack": judge}
    if all("never_knew" in each.arms for each in held):
        curves["never_knew"] = GLYPH
        sums["never_knew"] = summed([each.arms["never_knew"].rates[GLYPH] for each in held])
    sums["curve"] = {
        arm: {
            str(points[0].step): summed([point.rates[who] for point in points])
            for points in zip(*(each.arms[arm].curve for each in held), strict=True)
        }
        for arm, who in curves.items()
    }
    sums["half_steps"] = {
        arm: [each.half_steps[arm] for each in held] for arm in curves if all(arm in each.half_steps for each in held)
    }
    sums["spent"] = {key: sum(getattr(each.budget, key) for each in held) / len(held) for key in SPENT}
    return {**sums, "judge": judge, "config": dict(held[0].config)}


def summed(rates: Sequence[Estimate]) -> Found:
    """Prompts won of all, with the exact interval."""
    return asdict(clopper_pearson(round(sum(r.value * r.n for r in rates)), sum(r.n for r in rates)))
