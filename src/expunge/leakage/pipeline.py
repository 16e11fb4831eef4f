"""The one pipeline that looks for a leak, and the controls that run the very same pipeline on data that are known.

Source: certificates.md, sections 8 and 9.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from expunge.leakage.box import Box
from expunge.leakage.heads import Head, accuracy_p, calibrated, log_loss, trained
from expunge.leakage.lower import Portfolio, TwinScores, portfolio
from expunge.leakage.twins import Split

SPIKES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
REPEATS, POWER = 20, 0.8
PERMUTATIONS = 999
BASE_HEAD = "base"
"""Name of D0, the head trained on the base model's pictures only."""


@dataclass(frozen=True)
class Look:
    """What observers see of one arm, row i about twin pair i: features by extractor, a yes or no by detector."""

    features: Mapping[str, Float[np.ndarray, "n _"]]
    fired: Mapping[str, Bool[np.ndarray, "n"]]

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    def mixed(self, other: "Look", rows: Bool[np.ndarray, "n"]) -> "Look":
        """Replace some rows by another arm's."""
        features = {name: np.where(rows[:, None], other.features[name], x) for name, x in self.features.items()}
        return Look(features, {name: np.where(rows, other.fired[name], yes) for name, yes in self.fired.items()})


@dataclass(frozen=True)
class Finding:
    """What the pipeline says of two arms: the chosen head's bounds at delta / 2, the detectors' boxes at delta / 2."""

    head: str
    scores: TwinScores
    bounds: Portfolio
    boxes: Mapping[str, Box]

    @property
    def bits(self) -> float:
        """Lower bound on I(C; X) with 1 - delta, over the head and all detectors."""
        return max([self.bounds.bits, *(box.least_bits for box in self.boxes.values())])


def base_heads(concept: Look, anchor: Look, split: Split, delta: float) -> dict[str, Head]:
    """Train D0 on the base model's two arms, one per extractor."""
    return {name: trained(concept.features[name], anchor.features[name], split, delta) for name in concept.features}


def look_for_leak(
    concept: Look, anchor: Look, split: Split, delta: float, base: Mapping[str, Head] | None = None
) -> Finding:
    """Train a head per extractor, add D0 if given, keep the one that calibrates best, and test that one, once.

    D0 is calibrated anew on these arms, never refitted. Each test picture is looked at by one head only, so the
    choice costs no confidence.
    """
    heads = {name: trained(concept.features[name], anchor.features[name], split, delta) for name in concept.features}
    known = {
        name: calibrated(head, concept.features[name], anchor.features[name], split.calibrate, delta)
        for name, head in (base or {}).items()
    }
    entries = [*((name, name, head) for name, head in heads.items())]
    entries += [(f"{BASE_HEAD}-{name}", name, head) for name, head in known.items()]

    def calibration_loss(entry: tuple[str, str, Head]) -> float:
        _, name, head = entry
        return log_loss(head.on(concept.features[name], anchor.features[name], split.calibrate))

    label, name, head = min(entries, key=calibration_loss)
    scores = head.on(concept.features[name], anchor.features[name], split.test)
    return Finding(label, scores, portfolio(scores, head.threshold, delta / 2), boxes(concept, anchor, delta / 2))


def attribution(
    concept: Look, anchor: Look, split: Split, delta: float, base: Mapping[str, Head]
) -> tuple[str, TwinScores, Portfolio]:
    """Bound I(C; D0(X)): the same bounds for the base model's heads alone, as they are, the best one by calibration."""

    def calibration_loss(name: str) -> float:
        return log_loss(base[name].on(concept.features[name], anchor.features[name], split.calibrate))

    name = min(base, key=calibration_loss)
    scores = base[name].on(concept.features[name], anchor.features[name], split.test)
    return f"{BASE_HEAD}-{name}", scores, portfolio(scores, base[name].threshold, delta)


def boxes(concept: Look, anchor: Look, delta: float) -> dict[str, Box]:
    """Give every fixed detector its box over all pairs, at delta over their number each."""
    share, n = delta / max(len(concept.fired), 1), (len(concept), len(anchor))
    return {
        name: Box.of((int(yes.sum()), int(anchor.fired[name].sum())), n, share) for name, yes in concept.fired.items()
    }


def null_p(first: Look, second: Look, split: Split, delta: float, seed: int) -> float:
    """Permutation p-value of the pipeline on two arms that are known to have one law."""
    return accuracy_p(look_for_leak(first, second, split, delta).scores, PERMUTATIONS, seed)


def shuffled(concept: Look, anchor: Look, seed: int) -> tuple[Look, Look]:
    """Exchange the two pictures of about half of the twin pairs, chosen by coin: C says nothing any more."""
    rows = np.random.default_rng(seed).random(len(concept)) < 0.5
    return concept.mixed(anchor, rows), anchor.mixed(concept, rows)


@dataclass(frozen=True)
class Spikes:
    """What spike-in controls are made of: two anchor arms of independent seeds, and the base model's concept arm."""

    anchor: Look
    again: Look
    concept: Look
    split: Split
    base: Mapping[str, Head]
    delta: float

    def power(self, share: float, rng: np.random.Generator) -> float:
        """How often the pipeline finds this share of concept pictures among the second anchor arm's.

        Which pictures is drawn anew in each repetition; the split is the certificate's own, so that D0 never meets
        its training pictures in the test.
        """
        found = 0
        for _ in range(REPEATS):
            spiked = self.again.mixed(self.concept, rng.random(len(self.again)) < share)
            found += look_for_leak(spiked, self.anchor, self.split, self.delta, self.base).bits > 0
        return found / REPEATS

    def limit(self, seed: int, shares: Sequence[float] = SPIKES) -> tuple[float | None, dict[str, float]]:
        """Find the smallest share found with 80 % power, from the largest downwards; None if not even that one is.

        Also the powers on the way.
        """
        limit, powers, rng = None, dict[str, float](), np.random.default_rng(seed)
        for share in sorted(shares, reverse=True):
            powers[f"{share:g}"] = self.power(share, rng)
            if powers[f"{share:g}"] < POWER:
                break
            limit = share
        return limit, powers
