"""From pictures to the numbers of a leakage certificate: what observers see of each arm, and what follows from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from json import dumps

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.core.measure import Detector
from expunge.core.records import OperatingPoint
from expunge.core.registry import catalogue
from expunge.leakage import box
from expunge.leakage.family import family_bits
from expunge.leakage.heads import accuracy_p, cosine_features, stacked
from expunge.leakage.lower import Portfolio, TwinScores, equivalence
from expunge.leakage.pipeline import (
    PERMUTATIONS,
    Finding,
    Look,
    Spikes,
    attribution,
    base_heads,
    look_for_leak,
    null_p,
    shuffled,
)
from expunge.leakage.record import DELTA, Controls, DetectorRow, FamilyRow, Lower
from expunge.leakage.twins import Split
from expunge.ops.stats import clopper_pearson
from expunge.stages import _files
from expunge.stages._arms import ARMS, Pictures

CHUNK = 64
NORM = 1.0
"""B of the family rows: with more, a few hundred pictures bound nothing."""
WINDOW = 8
"""Latents are averaged to at most this many rows and columns before heads see them."""
WEAKENED = ("plain", "half", "quarter", "blurred")
_Images = Float[Tensor, "b 3 h w"]
Weakened = Mapping[str, Mapping[str, tuple[float, float]]]


@dataclass(frozen=True)
class Observers:
    """Who looks: extractors of pixels and latents, and detectors with their operating points for the concept."""

    base: Generator
    judges: Mapping[str, Detector]
    points: Mapping[str, OperatingPoint]
    concept: Concept

    def look(self, pictures: Pictures, arm: str, run: Run) -> Look:
        """Look at all pictures of an arm."""
        features, fired = [], []
        for start in range(0, len(pictures.pairs), CHUNK):
            images = pictures.read(arm, start, start + CHUNK)
            features.append(self._features(images))
            fired.append({name: self._fires(name, images) for name in self.judges})
            run.progress(f"look at {arm}", min(start + CHUNK, len(pictures.pairs)), len(pictures.pairs))
        return Look(stacked(features), {name: np.concatenate([part[name] for part in fired]) for name in self.judges})

    def weakened(self, pictures: Pictures, run: Run) -> dict[str, dict[str, tuple[float, float]]]:
        """Give each detector's rate on weakened pictures of the concept by the base model: exact ends by name and kind.

        A detector's sensitivity is that of its calibration pictures; this says how fast it falls on fainter ones.
        """
        fired: dict[str, dict[str, int]] = {name: dict.fromkeys(WEAKENED, 0) for name in self.judges}
        for start in range(0, len(pictures.pairs), CHUNK):
            shown, plain = (pictures.read(arm, start, start + CHUNK) for arm in ("base-concept", "base-anchor"))
            for kind, faded in weaker(shown, plain).items():
                for name in self.judges:
                    fired[name][kind] += int(self._fires(name, faded).sum())
            run.progress("look at weakened pictures", min(start + CHUNK, len(pictures.pairs)), len(pictures.pairs))
        return {
            name: {kind: _ends(hits, len(pictures.pairs)) for kind, hits in kinds.items()}
            for name, kinds in fired.items()
        }

    def _fires(self, name: str, images: Float[Tensor, "b 3 h w"]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return (self.judges[name].score(images, self.concept) >= self.points[name].threshold).cpu().numpy()

    @torch.no_grad()
    def _features(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Float[np.ndarray, "b _"]]:
        latents = self.base.absorb(images.to(next(iter(self.base.network.parameters())).device)).float()
        sides = (min(WINDOW, latents.shape[2]), min(WINDOW, latents.shape[3]))
        found = {name: judge.features(images) for name, judge in self.judges.items()}
        vectors = {name: x.flatten(1).cpu().double().numpy() for name, x in found.items() if x is not None}
        return {
            "pixels": cosine_features(images.double().numpy()),
            "latents": adaptive_avg_pool2d(latents, sides).flatten(1).cpu().double().numpy(),
            **vectors,
        }


def weaker(shown: _Images, plain: _Images) -> dict[str, _Images]:
    """Weaken pictures: a share of them mixed into pictures without the concept, or pixels averaged with those near."""
    return {
        "plain": shown,
        "half": 0.5 * shown + 0.5 * plain,
        "quarter": 0.25 * shown + 0.75 * plain,
        "blurred": avg_pool2d(shown, 5, stride=1, padding=2, count_include_pad=False),
    }


def _ends(hits: int, n: int) -> tuple[float, float]:
    found = clopper_pearson(hits, n, 1 - DELTA)
    return found.low, found.high


@dataclass(frozen=True)
class Measured:
    """The numbers of a certificate that come from pictures."""

    lower: Lower
    attribution: Lower
    detector: tuple[DetectorRow, ...]
    family: tuple[FamilyRow, ...]
    controls: Controls


def measured(
    looks: Mapping[str, Look], weakened: Weakened, observers: Observers, split: Split, seed: int, run: Run
) -> Measured:
    """Run the pipeline on the erased model's arms, and on arms whose answer is known."""
    concept, anchor, again, base_concept, base_anchor = (looks[arm] for arm in ARMS)
    heads = base_heads(base_concept, base_anchor, split, DELTA)
    found = look_for_leak(concept, anchor, split, DELTA, heads)
    known, known_scores, known_bounds = attribution(concept, anchor, split, DELTA, heads)
    run.progress("controls", 0, 2)
    spikes = Spikes(anchor, again, base_concept, split, heads, DELTA)
    nulls = (
        null_p(anchor, again, split, DELTA, seed),
        null_p(*shuffled(base_concept, base_anchor, seed), split, DELTA, seed),
    )
    run.progress("controls", 1, 2)
    limit, powers = spikes.limit(seed)
    run.progress("controls", 2, 2)
    return Measured(
        lower=_lower(found.head, found.bounds, found.scores, seed),
        attribution=_lower(known, known_bounds, known_scores, seed),
        detector=tuple(_row(name, observers, found, looks, weakened[name], seed) for name in observers.judges),
        family=_family(concept, anchor),
        controls=Controls(
            null_p=min(1.0, 2 * min(nulls)),
            ceiling_bits=look_for_leak(base_concept, base_anchor, split, DELTA).bits,
            spike_limit=limit,
            spike_power=powers,
        ),
    )


def _lower(head: str, bounds: Portfolio, scores: TwinScores, seed: int) -> Lower:
    return Lower(
        head=head,
        acc=bounds.acc,
        chan=bounds.chan,
        log=bounds.log,
        portfolio_bits=bounds.bits,
        tv_lo=bounds.tv,
        p=accuracy_p(scores, PERMUTATIONS, seed),
        equivalence=equivalence(scores.correct, 2 * len(scores.concept), DELTA),
    )


def _family(concept: Look, anchor: Look) -> tuple[FamilyRow, ...]:
    share = DELTA / len(concept.features)
    return tuple(
        FamilyRow(kind=name, B=NORM, n=2 * len(concept), vinfo_hi=family_bits(x, anchor.features[name], NORM, share))
        for name, x in concept.features.items()
    )


def _row(
    name: str,
    observers: Observers,
    found: Finding,
    looks: Mapping[str, Look],
    weakened: Mapping[str, tuple[float, float]],
    seed: int,
) -> DetectorRow:
    point, seen = observers.points[name], found.boxes[name]
    shown = {
        arm: box.corrected(looks[arm].fired[name].tolist(), point, name, seed=seed, delta=DELTA / 2)
        for arm in ("concept", "anchor", "base-concept")
    }
    ends = {arm: (each.low, each.high) for arm, each in shown.items()}
    return DetectorRow(
        name=name,
        hash=_digest(name, point),
        thr=point.threshold,
        tpr=float(looks["concept"].fired[name].mean()),
        fpr=float(looks["anchor"].fired[name].mean()),
        ci={"tpr": seen.tpr, "fpr": seen.fpr},
        I_lo=seen.least_bits,
        I_hi=seen.most_bits,
        sens=point.sensitivity.value,
        spec=point.specificity.value,
        corrected_rate_ci={**ends, "difference": box.presence(shown["concept"], shown["anchor"])},
        weakened=weakened,
    )


def _digest(name: str, point: OperatingPoint) -> str:
    """Hash a detector's file with its operating point, which was measured on its weights."""
    return _files.sha256(catalogue("detectors")[name].read_bytes() + dumps(asdict(point), sort_keys=True).encode())
