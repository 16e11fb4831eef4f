"""Intervals against SciPy, against each other, and against simulated truth."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, hmean

from expunge.core.errors import InputError
from expunge.core.records import OperatingPoint
from expunge.ops.stats import (
    Sample,
    clopper_pearson,
    corrected_draws,
    harmonic,
    harmonic_estimate,
    pooled,
    pooled_point,
    rate,
    rogan_gladen,
)

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
rates = st.floats(0, 1)


def point(sens, spec, n=200, threshold=0.0):
    return OperatingPoint(
        threshold=threshold,
        sensitivity=clopper_pearson(round(sens * n), n),
        specificity=clopper_pearson(round(spec * n), n),
        n=2 * n,
    )


def clustered(rng, p, groups, size, rho):
    """Draw decisions whose clusters share a rate: Beta with mean p and correlation rho."""
    own = rng.beta(p * (1 - rho) / rho, (1 - p) * (1 - rho) / rho, groups) if rho else np.full(groups, p)
    hits = rng.random((groups, size)) < own[:, None]
    return hits, np.repeat(np.arange(groups), size)


def sample(hits, clusters):
    return Sample.of(hits.ravel().tolist(), clusters.tolist())


@given(counts, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_binomial_intervals_are_scipys(count, level):
    hits, n = count
    got, want = clopper_pearson(hits, n, level), binomtest(hits, n).proportion_ci(level, "exact")
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-9)
    assert got.value == hits / n
    assert (got.n, got.clusters, got.level) == (n, n, level)


@pytest.mark.parametrize(("hits", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_counts_that_are_none_are_refused(hits, n):
    with pytest.raises(InputError, match=f"{hits} hits of {n}"):
        clopper_pearson(hits, n)


def test_zero_hits_give_the_known_upper_bounds():
    """One-sided 95 % bounds at zero hits, from the table of certificates.md section 5."""
    for n, bound in ((10, 0.259), (50, 0.058), (100, 0.030), (299, 0.010)):
        assert clopper_pearson(0, n, 0.90).high == pytest.approx(bound, abs=6e-4)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_clopper_pearson_covers_exactly(p):
    from scipy.stats import binom

    n = 60
    mass = binom.pmf(np.arange(n + 1), n, p)
    exact = sum(m for k, m in enumerate(mass) if clopper_pearson(k, n).low <= p <= clopper_pearson(k, n).high)
    assert exact >= 0.95


LAWS = [
    (0.02, 20, 4, 0.5),
    (0.05, 10, 8, 0.3),
    (0.1, 40, 5, 0.3),
    (0.5, 10, 8, 0.3),
    (0.9, 20, 4, 0.1),
    (0.03, 30, 1, 0),
]


@pytest.mark.parametrize(("p", "groups", "size", "rho"), LAWS)
def test_clustered_rates_cover_the_truth(p, groups, size, rho):
    rng, runs = np.random.default_rng(7), 250
    found = [rate(sample(*clustered(rng, p, groups, size, rho)), seed=i) for i in range(runs)]
    covered = np.mean([e.low <= p <= e.high for e in found])
    assert covered >= 0.95 - 3 * (0.95 * 0.05 / runs) ** 0.5
    assert all(e.n == groups * size and e.clusters == groups for e in found)


def test_ignoring_clusters_would_not_cover():
    """The negative side: images counted as independent miss the truth far too often when prompts differ."""
    rng, p, runs = np.random.default_rng(7), 0.5, 250
    naive = [clopper_pearson(int(clustered(rng, p, 10, 8, 0.3)[0].sum()), 80) for _ in range(runs)]
    assert np.mean([e.low <= p <= e.high for e in naive]) < 0.85


def test_a_cluster_interval_is_wider_than_a_naive_one_when_images_agree():
    hits = np.repeat(np.array([[True], [False]] * 10), 8, axis=1)
    same = sample(hits, np.repeat(np.arange(20), 8))
    alone = sample(hits, np.arange(160))
    assert same.effective_n == pytest.approx(19, abs=1.5)
    assert alone.effective_n == pytest.approx(160, abs=2)
    wide, narrow = rate(same, seed=0), rate(alone, seed=0)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


@pytest.mark.parametrize("hit", [False, True])
def test_no_hits_at_all_still_have_an_interval(hit):
    found = rate(sample(np.full((12, 5), hit), np.repeat(np.arange(12), 5)), seed=0)
    bound = clopper_pearson(12 if hit else 0, 12)
    assert found.value == float(hit)
    assert found.low <= bound.low
    assert found.high >= bound.high
    assert 0.1 < found.high - found.low < 0.5


def test_one_prompt_says_next_to_nothing():
    found = rate(sample(np.array([[True, False, True, True]]), np.zeros(4, int)), seed=0)
    assert found.high - found.low > 0.8


def test_the_same_seed_gives_the_same_interval():
    data = sample(*clustered(np.random.default_rng(1), 0.3, 15, 4, 0.2))
    assert rate(data, seed=3) == rate(data, seed=3)


def test_malformed_samples_are_refused():
    for values, clusters in (([], []), ([True], [1, 2]), ([0.5, 1.5], [1, 2])):
        with pytest.raises(InputError):
            Sample.of(values, clusters)


def test_a_perfect_detector_is_not_corrected_for():
    data = sample(*clustered(np.random.default_rng(1), 0.3, 30, 4, 0.2))
    found = rogan_gladen(data, point(1.0, 1.0, n=10**6), "judge", seed=0)
    assert found.value == pytest.approx(data.value, abs=1e-4)
    raw = rate(data, seed=0, level=1 - 0.05 / 3)
    assert (found.low, found.high) == pytest.approx((raw.low, raw.high), abs=1e-4)
    assert (found.detector, found.corrected_for, found.level) == ("judge", "judge", 0.95)


@given(rates, st.floats(0.6, 1), st.floats(0.6, 1))
def test_the_correction_inverts_the_detectors_law(p, sens, spec):
    """q = p sens + (1 - p)(1 - spec) goes back to p, for the point as rounded to counts."""
    at = point(sens, spec)
    q = p * at.sensitivity.value + (1 - p) * (1 - at.specificity.value)
    found = rogan_gladen(Sample.of([q, q], ["a", "b"]), at, "judge", seed=0)
    assert found.value == pytest.approx(p, abs=1e-9)


@pytest.mark.parametrize(
    ("p", "sens", "spec"), [(0.0, 0.8, 0.98), (0.05, 0.7, 0.95), (0.4, 0.9, 0.9), (0.9, 0.85, 0.99)]
)
def test_corrected_rates_cover_the_truth_with_the_detector_uncertain_too(p, sens, spec):
    rng, runs, covered = np.random.default_rng(3), 150, 0
    for i in range(runs):
        shown = clustered(rng, p, 20, 4, 0.2 if 0 < p < 1 else 0)[0]
        fired = np.where(shown, rng.random(shown.shape) < sens, rng.random(shown.shape) > spec)
        n = 100
        at = OperatingPoint(
            threshold=0.0,
            sensitivity=clopper_pearson(int(rng.binomial(n, sens)), n),
            specificity=clopper_pearson(int(rng.binomial(n, spec)), n),
            n=2 * n,
        )
        found = rogan_gladen(sample(fired, np.repeat(np.arange(20), 4)), at, "judge", seed=i)
        covered += found.low <= p <= found.high
    assert covered / runs >= 0.95 - 3 * (0.95 * 0.05 / runs) ** 0.5


def test_a_poor_detector_turns_no_finding_into_a_wide_bound():
    """0 of 500 with a sensitivity of 26 % is not "0.7 % at most"; the honest bound is several times that."""
    clean = Sample.of([False] * 500, list(range(500)))
    bound = rogan_gladen(clean, point(0.263, 1.0, n=10_000), "nude", seed=0)
    assert bound.low == 0
    assert 0.025 < bound.high < 0.05
    assert rate(clean, seed=0).high < 0.01


def test_a_detector_at_chance_is_refused_and_one_near_it_gives_no_bound():
    data = Sample.of([True, False] * 10, list(range(20)))
    with pytest.raises(InputError, match="no better than chance"):
        rogan_gladen(data, point(0.5, 0.5), "coin", seed=0)
    vague = rogan_gladen(data, point(0.55, 0.5, n=20), "coin", seed=0)
    assert (vague.low, vague.high) == (0.0, 1.0)


def test_pooling_adds_counts():
    both = pooled([clopper_pearson(3, 10), clopper_pearson(40, 50)])
    assert (both.value, both.n) == (43 / 60, 60)
    joint = pooled_point([point(0.9, 0.8, n=100), point(0.7, 1.0, n=100)])
    assert (joint.sensitivity.value, joint.specificity.value, joint.n) == (0.8, 0.9, 400)
    with pytest.raises(InputError, match="thresholds"):
        pooled_point([point(0.9, 0.9), point(0.9, 0.9, threshold=0.5)])


def test_harmonic_is_the_harmonic_mean_of_what_should_be_high():
    assert harmonic(0.2, 0.9, 0.4) == pytest.approx(hmean([0.8, 0.9, 0.6]))
    assert harmonic(0.0, 1.0, 0.0) == 1


@example(0.0, 2.2250738585e-313, 0.0)
@given(rates, rates, rates)
def test_harmonic_lies_between_its_parts_and_a_lost_part_loses_all(a, b, c):
    parts = (1 - a, b, 1 - c)
    value = harmonic(a, b, c)
    assert min(parts) - 1e-9 <= value <= max(parts) + 1e-9 or value == 0
    assert harmonic(1.0, b, c) == harmonic(a, 0.0, c) == harmonic(a, b, 1.0) == 0


def test_the_harmonic_estimate_is_the_formula_on_corrected_rates():
    rng = np.random.default_rng(5)
    parts = tuple(sample(*clustered(rng, p, 25, 4, 0.1)) for p in (0.1, 0.9, 0.2))
    at = point(0.95, 0.98)
    found = harmonic_estimate(parts, (at, at, at), "judge", seed=0)
    fixed = [rogan_gladen(part, at, "judge", seed=0).value for part in parts]
    assert found.value == pytest.approx(harmonic(*fixed))
    assert (found.n, found.clusters, found.corrected_for) == (300, 75, "judge")
    assert 0 < found.high - found.low < 0.3
    assert harmonic_estimate(parts, (at, None, at), "judge", seed=0).corrected_for is None


def test_the_harmonic_interval_covers():
    truth, rng, runs, covered = (0.1, 0.9, 0.2), np.random.default_rng(11), 120, 0
    for i in range(runs):
        parts = tuple(sample(*clustered(rng, p, 25, 4, 0.2)) for p in truth)
        found = harmonic_estimate(parts, (None, None, None), "judge", seed=i)
        covered += found.low <= harmonic(*truth) <= found.high
    assert covered / runs >= 0.95 - 3 * (0.95 * 0.05 / runs) ** 0.5


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_draws_stay_in_range_and_centre_on_the_rate(seed):
    data = sample(*clustered(np.random.default_rng(seed), 0.3, 20, 3, 0.2))
    draws = corrected_draws(data, None, np.random.default_rng(seed))
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert draws.mean() == pytest.approx(data.value, abs=0.05)
