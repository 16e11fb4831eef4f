"""D-certificate: what one fixed yes/no detector sees, from both sides, and with its own errors removed.

Source: certificates.md, sections 4 and 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from expunge.core.records import Estimate, OperatingPoint
from expunge.leakage.information import channel
from expunge.leakage.lower import least_rate, most_rate
from expunge.ops.stats import Sample, rogan_gladen


@dataclass(frozen=True)
class Box:
    """Rates of a detector's yes under C = 1 and C = 0 with their ends, all four holding together."""

    tpr: tuple[float, float]
    fpr: tuple[float, float]

    @classmethod
    def of(cls, hits: tuple[int, int], n: tuple[int, int], delta: float) -> "Box":
        """Take each of the four ends at delta / 4; hits and n: of the concept arm and of the anchor arm."""
        ends = [(least_rate(k, m, delta / 4), most_rate(k, m, delta / 4)) for k, m in zip(hits, n, strict=True)]
        return cls(ends[0], ends[1])

    @property
    def least_bits(self) -> float:
        """I(C; D) is at least this: J at the corner where the rates are closest, 0 where the box meets the diagonal."""
        (t_lo, t_hi), (f_lo, f_hi) = self.tpr, self.fpr
        if t_lo > f_hi:
            return channel(t_lo, f_hi)
        return channel(t_hi, f_lo) if t_hi < f_lo else 0.0

    @property
    def most_bits(self) -> float:
        """I(C; D) is at most this: J is convex, so its maximum over the box is at one of the two outer corners."""
        (t_lo, t_hi), (f_lo, f_hi) = self.tpr, self.fpr
        return max(channel(t_hi, f_lo), channel(t_lo, f_hi))


def corrected(fired: Sequence[bool], point: OperatingPoint, detector: str, *, seed: int, delta: float) -> Estimate:
    """Give the true share of images that show the concept, the detector's errors removed; one image per prompt.

    Ends of Rogan and Gladen as in `ops.stats.rogan_gladen`. The sensitivity is that of the calibration images: on
    images unlike those it is unknown. Raises InputError for a detector no better than chance.
    """
    sample = Sample.of(list(fired), list(range(len(fired))))
    return rogan_gladen(sample, point, detector, seed=seed, level=1 - delta)


def presence(concept: Estimate, anchor: Estimate) -> tuple[float, float]:
    """Ends of P(concept shown | C = 1) - P(concept shown | C = 0) from intervals that hold together."""
    return concept.low - anchor.high, concept.high - anchor.low
