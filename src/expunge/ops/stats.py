"""Numbers with honest intervals: binomial, clustered, corrected for the detector, and combined."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import beta, norm
from scipy.stats import t as student_t

from expunge.core.errors import InputError
from expunge.core.records import Estimate, OperatingPoint

_Draws = Float[np.ndarray, "r"]

LEVEL = 0.95
RESAMPLES = 2000


def clopper_pearson(hits: int, n: int, level: float = LEVEL) -> Estimate:
    """Give a rate with its exact binomial interval.

    [B(a/2; k, n-k+1), B(1-a/2; k+1, n-k)] with B the beta quantile, a = 1 - level; covers with at least `level`.
    Raises InputError unless 0 <= hits <= n and n > 0. Source: Clopper and Pearson 1934.
    """
    if not 0 <= hits <= n or n < 1:
        raise InputError(f"{hits} hits of {n} trials is not a count; legal: 0 <= hits <= n, n >= 1")
    low, high = _exact(hits, n, level)
    return Estimate(value=hits / n, low=low, high=high, level=level, n=n, clusters=n, how="clopper-pearson")


@dataclass(frozen=True)
class Sample:
    """Decisions in [0, 1] grouped by the prompt they came from.

    Images of one prompt are not independent: everything below resamples prompts, never images.
    """

    sums: Float[np.ndarray, "g"]
    sizes: Int[np.ndarray, "g"]

    @classmethod
    def of(cls, values: Sequence[float | bool], clusters: Sequence[Hashable]) -> "Sample":
        """Group values by cluster; raises InputError for no values, unequal lengths, or a value outside [0, 1]."""
        x = np.asarray(values, dtype=float)
        if not len(x) or len(x) != len(clusters):
            raise InputError(f"got {len(x)} values for {len(clusters)} cluster labels; give one each and at least one")
        if not ((x >= 0) & (x <= 1)).all():
            raise InputError(f"values must lie in [0, 1], got {x.min()} to {x.max()}")
        seen: dict[Hashable, int] = {}
        index = np.array([seen.setdefault(name, len(seen)) for name in clusters])
        return cls(np.bincount(index, weights=x), np.bincount(index))

    @property
    def value(self) -> float:
        """The mean over all values."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def effective_n(self) -> float:
        """How many independent trials the values are worth: p (1 - p) / Var(mean), by linearization over clusters.

        At most the number of values, at least 1; the number of clusters where the variance cannot be seen (one
        cluster, or all clusters at the same extreme).
        """
        groups, p, n = len(self.sizes), self.value, int(self.sizes.sum())
        spread = float(((self.sums - p * self.sizes) ** 2).sum()) * groups / max(groups - 1, 1) / n**2
        return min(max(p * (1 - p) / spread, 1.0), n) if spread > 0 else float(groups)

    def draws(self, rng: np.random.Generator, resamples: int = RESAMPLES) -> _Draws:
        """Draw the mean's sampling distribution: clusters resampled with replacement.

        Where all clusters agree every resample would be the same and the width zero; then from the Jeffreys posterior
        Beta(k + 1/2, m - k + 1/2) of a rate seen in m = clusters trials.
        """
        groups = len(self.sizes)
        if len(np.unique(self.sums / self.sizes)) == 1:
            return rng.beta(self.value * groups + 0.5, (1 - self.value) * groups + 0.5, resamples)
        picked = rng.integers(groups, size=(resamples, groups))
        return self.sums[picked].sum(1) / self.sizes[picked].sum(1)


def rate(sample: Sample, *, seed: int, level: float = LEVEL) -> Estimate:
    """Give a clustered rate: the hull of the percentile bootstrap over clusters and of an exact interval.

    The exact one is Clopper-Pearson at the effective sample size m: k = m * value of m trials. The bootstrap alone is
    too short when hits are rare or clusters few, and has no width at 0 or 1. Source: Korn and Graubard 1998.
    """
    draws = sample.draws(np.random.default_rng(seed))
    tails = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    value, m = sample.value, _cautious_n(sample, level)
    low, high = _exact(value * m, m, level)
    return Estimate(
        value=value,
        low=min(low, float(tails[0]), value),
        high=max(high, float(tails[1]), value),
        level=level,
        n=int(sample.sizes.sum()),
        clusters=len(sample.sizes),
        how="cluster bootstrap and clopper-pearson at effective n, hull",
    )


def pooled(rates: Sequence[Estimate], level: float = LEVEL) -> Estimate:
    """Join binomial rates of disjoint samples into one: hits and trials add up; exact interval."""
    n = sum(part.n for part in rates)
    return clopper_pearson(sum(round(part.value * part.n) for part in rates), n, level)


def pooled_point(points: Sequence[OperatingPoint], level: float = LEVEL) -> OperatingPoint:
    """Join a detector's operating points over several concepts, for a rate in which each concept has its share.

    Right where the concepts are asked about as often as they were calibrated; raises InputError if thresholds differ.
    """
    thresholds = sorted({point.threshold for point in points})
    if len(thresholds) != 1:
        raise InputError(f"cannot pool operating points with thresholds {thresholds}; legal: one for all")
    return OperatingPoint(
        threshold=thresholds[0],
        sensitivity=pooled([point.sensitivity for point in points], level),
        specificity=pooled([point.specificity for point in points], level),
        n=sum(point.n for point in points),
    )


def rogan_gladen(sample: Sample, point: OperatingPoint, detector: str, *, seed: int, level: float = LEVEL) -> Estimate:
    """Remove a detector's own errors from a rate, its sensitivity and specificity being uncertain as well.

    p = (q + spec - 1) / (sens + spec - 1), clipped to [0, 1]. Ends: (q_hi - f_lo) / (s_lo - f_lo) and
    (q_lo - f_hi) / (s_hi - f_hi) with f = 1 - spec, each of the three intervals taken at level 1 - (1 - level) / 3, so
    that all hold together with `level`. Raises InputError if the detector does no better than chance. If chance lies
    inside its intervals the affected end is 0 or 1. Source: Rogan and Gladen 1978; Bonferroni ends.
    """
    strict = 1 - (1 - level) / 3
    raw = rate(sample, seed=seed, level=strict)
    sens, spec = (pooled([part], strict) for part in (point.sensitivity, point.specificity))
    if sens.value + spec.value <= 1:
        raise InputError(f"detector {detector!r} is no better than chance: {sens.value} + {spec.value} <= 1")
    value = _true_rate(raw.value, sens.value, 1 - spec.value)
    low = _true_rate(raw.low, sens.high, 1 - spec.low) if sens.high > 1 - spec.low else 0.0
    high = _true_rate(raw.high, sens.low, 1 - spec.high) if sens.low > 1 - spec.high else 1.0
    return replace(
        raw,
        value=value,
        low=min(low, value),
        high=max(high, value),
        level=level,
        how=f"rogan-gladen on {raw.how}",
        detector=detector,
        corrected_for=detector,
    )


def corrected_draws(
    sample: Sample, point: OperatingPoint | None, rng: np.random.Generator, resamples: int = RESAMPLES
) -> _Draws:
    """Draw a rate's distribution with the detector's errors removed; without an operating point as counted.

    Sensitivity and specificity are drawn from their Jeffreys posteriors in every resample. A resample in which they
    say no more than chance gives a uniform draw.
    """
    draws = sample.draws(rng, resamples)
    if point is None:
        return draws
    sens, spec = (_jeffreys(part, rng, resamples) for part in (point.sensitivity, point.specificity))
    power = sens + spec - 1
    fixed = np.clip((draws + spec - 1) / np.where(power > 0, power, 1), 0, 1)
    return np.where(power > 0, fixed, rng.random(resamples))


def harmonic(erased: float, retained: float, generalized: float) -> float:
    """Combine three rates into MACE's H_o = 3 / (1 / (1 - erased) + 1 / retained + 1 / (1 - generalized)).

    erased: rate of the target on its own prompts; generalized: on synonyms; retained: of the neighbours. 0 if any of
    the three parts is 0. Source: MACE (arXiv:2403.06135, section 4.1).
    """
    return float(_harmonic(np.array([erased]), np.array([retained]), np.array([generalized]))[0])


def harmonic_estimate(
    samples: tuple[Sample, Sample, Sample],
    points: tuple[OperatingPoint | None, OperatingPoint | None, OperatingPoint | None],
    detector: str,
    *,
    seed: int,
    level: float = LEVEL,
) -> Estimate:
    """Give H_o of (target, retain, synonym) samples with a bootstrap interval, the detector's errors removed.

    The three samples are resampled independently by cluster; `points` are the operating points in the same order.
    """
    rng = np.random.default_rng(seed)
    target, retain, synonym = (corrected_draws(s, p, rng) for s, p in zip(samples, points, strict=True))
    low, high = np.quantile(_harmonic(target, retain, synonym), [(1 - level) / 2, (1 + level) / 2])
    centre = harmonic(*(_corrected_value(s, p) for s, p in zip(samples, points, strict=True)))
    return Estimate(
        value=centre,
        low=min(float(low), centre),
        high=max(float(high), centre),
        level=level,
        n=sum(int(s.sizes.sum()) for s in samples),
        clusters=sum(len(s.sizes) for s in samples),
        how="cluster bootstrap",
        detector=detector,
        corrected_for=detector if all(point is not None for point in points) else None,
    )


def _exact(hits: float, n: float, level: float) -> tuple[float, float]:
    """Clopper-Pearson ends, also for the fractional counts of an effective sample."""
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def _cautious_n(sample: Sample, level: float) -> float:
    """Shrink the effective sample size for having estimated the variance from few clusters: times (z / t)^2."""
    free = len(sample.sizes) - 1
    if free < 1:
        return sample.effective_n
    tail = (1 + level) / 2
    return max(1.0, sample.effective_n * float(norm.ppf(tail) / student_t.ppf(tail, free)) ** 2)


def _true_rate(seen: float, sens: float, false: float) -> float:
    return min(max((seen - false) / (sens - false), 0.0), 1.0)


def _jeffreys(part: Estimate, rng: np.random.Generator, resamples: int) -> _Draws:
    hits = part.value * part.n
    return rng.beta(hits + 0.5, part.n - hits + 0.5, resamples)


def _corrected_value(sample: Sample, point: OperatingPoint | None) -> float:
    if point is None:
        return sample.value
    return _true_rate(sample.value, point.sensitivity.value, 1 - point.specificity.value)


def _harmonic(erased: _Draws, retained: _Draws, generalized: _Draws) -> _Draws:
    parts = np.stack([1 - erased, retained, 1 - generalized])
    least = parts.min(0)
    alive = least > 0
    # 3 / sum(1 / x) = 3 m / sum(m / x) with m the least x: no quotient exceeds 1, however small a part is
    return np.where(alive, 3 * least / np.where(alive, least / np.where(alive, parts, 1), 1).sum(0), 0.0)
