"""Bounds against exact information, and the tables of certificates.md; how often they hold: test_coverage.py."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from expunge.core.errors import InputError
from expunge.core.records import OperatingPoint
from expunge.leakage.box import Box, corrected, presence
from expunge.leakage.information import (
    channel,
    contamination,
    divergence,
    entropy,
    fano,
    inverse_divergence,
    shannon,
    variation,
)
from expunge.leakage.lower import (
    TwinScores,
    accuracy_bits,
    channel_bits,
    equivalence,
    least_rate,
    log_bits,
    most_rate,
    portfolio,
)
from expunge.leakage.structure import Substitution
from expunge.ops.betting import betting_lower
from expunge.ops.stats import clopper_pearson
from leakage.test_coverage import LAWS, drawn, laws

share = st.floats(0, 1)
DELTA = 0.05


@given(share, share)
def test_the_channel_vanishes_only_on_its_diagonal_and_is_the_jensen_shannon_divergence(t, f):
    exact = shannon(np.array([t, 1 - t]), np.array([f, 1 - f]))
    assert channel(t, f) == pytest.approx(exact, abs=1e-9)
    assert channel(t, t) == pytest.approx(0, abs=1e-12)
    if abs(t - f) > 1e-3:
        assert channel(t, f) > 1e-7


@given(share, share, share)
def test_the_channel_grows_as_the_rates_part(a, b, c):
    f, t, further = sorted((a, b, c))
    assert channel(further, f) >= channel(t, f) - 1e-9
    assert channel(further, t) <= channel(further, f) + 1e-9


@given(share, share, share, share, share)
def test_the_channel_is_jointly_convex(t1, f1, t2, f2, w):
    middle = channel(w * t1 + (1 - w) * t2, w * f1 + (1 - w) * f2)
    assert middle <= w * channel(t1, f1) + (1 - w) * channel(t2, f2) + 1e-9


@given(share)
def test_a_clean_rare_leak_has_the_known_information(p):
    assert channel(p, 0) == pytest.approx(entropy(p / 2) - entropy(p) / 2, abs=1e-12) == contamination(p)
    assert contamination(p) <= p + 1e-12


def test_the_gate_with_equal_twins_meets_its_bound_and_with_differing_topics_breaks_it():
    """h2(m / 2) - h2(m) / 2 is exact for a disjoint Q and one law of twins, and false where topics differ; m holds."""
    for m in (0.01, 0.1, 0.5):
        alike = shannon(np.array([1 - m, m]), np.array([1.0, 0.0]))
        assert contamination(m) == pytest.approx(alike, abs=1e-12)
        # outcomes: twins of caught prompts, twins of missed prompts, what missed prompts show
        differing = shannon(np.array([1 - m, 0, m]), np.array([1 - m, m, 0]))
        assert differing == pytest.approx(m, abs=1e-9) and differing > 1.2 * contamination(m)


@given(st.integers(0, 10_000), share)
def test_a_gate_never_leaks_more_than_it_misses(seed, m):
    """Any laws of twins of caught and of missed prompts, and of what missed prompts show."""
    caught, missed, shown = np.random.default_rng(seed).dirichlet(np.full(6, 0.4), 3)
    assert shannon((1 - m) * caught + m * shown, (1 - m) * caught + m * missed) <= m + 1e-9


def test_no_structural_bound_without_exact_substitution():
    assert Substitution(0, 299, True).most_bits(DELTA) == pytest.approx(0.01, rel=0.02)
    with pytest.raises(InputError, match="differ"):
        Substitution(0, 299, False)
    with pytest.raises(InputError, match="not a count"):
        Substitution(3, 2, True)


@given(st.integers(0, 10_000))
def test_fano_and_total_variation_enclose_the_information(seed):
    p1, p0 = laws(np.random.default_rng(seed), 5)
    tv = variation(p1, p0)
    assert fano((1 + tv) / 2) <= shannon(p1, p0) + 1e-12 <= tv + 2e-12


@pytest.mark.parametrize("hits, n", [(0, 30), (30, 30), (7, 30), (1, 1)])
def test_one_sided_ends_are_beta_quantiles(hits, n):
    low = beta.ppf(DELTA, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(1 - DELTA, hits + 1, n - hits) if hits < n else 1.0
    assert (least_rate(hits, n, DELTA), most_rate(hits, n, DELTA)) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("n, bound", [(100, 0.0183), (500, 0.0037), (1000, 0.0018), (5000, 0.00037)])
def test_a_silent_detector_has_the_upper_bounds_of_the_table(n, bound):
    """Section 4: one-sided 2.5 % an arm; the ends at zero are exact, so a box at delta = .1 has them."""
    box = Box.of((0, 0), (n, n), 2 * DELTA)
    assert box.most_bits == pytest.approx(bound, rel=0.03)
    assert box.least_bits == 0


@pytest.mark.parametrize("n, bound", [(59, 0.0252), (100, 0.0149), (299, 0.0050), (1000, 0.0015), (2995, 0.0005)])
def test_no_misses_have_the_structural_bounds_of_the_table(n, bound):
    assert contamination(most_rate(0, n, DELTA)) == pytest.approx(bound, rel=0.035)


def test_lower_bounds_find_what_is_there():
    """The side that must fail: on a strong leak all three see most of it, on none all see none."""
    rng, n = np.random.default_rng(2), 500
    for name, least in (("strong", 0.35), ("equal coins", -1.0)):
        p1, p0 = (np.array(law) for law in LAWS[name])
        best = portfolio(drawn(rng, p1, p0, p1 / (p1 + p0), n), 0.6, DELTA)
        assert min(best.acc, best.chan, best.log) >= least
        assert (best.bits > 0) == (least > 0)


def test_which_bound_is_best_where_is_as_the_table_says():
    rng = np.random.default_rng(3)
    found = {"rare": [], "diffuse": []}
    for _ in range(3):
        leak = drawn(rng, np.array([0.948, 0.052]), np.array([0.998, 0.002]), np.array([0.48, 0.9]), 2000)
        found["rare"].append(portfolio(leak, 0.6, 3 * DELTA))
        x1, x0 = rng.normal(1, 1, 500), rng.normal(0, 1, 500)
        q1, q0 = (1 / (1 + np.exp(0.5 - x)) for x in (x1, x0))
        found["diffuse"].append(portfolio(TwinScores.of(q1, q0, range(500)), 0.7, 3 * DELTA))
    acc, chan, log = (np.mean([getattr(p, key) for p in found["rare"]]) for key in ("acc", "chan", "log"))
    assert chan > 2 * acc and chan > log and chan == pytest.approx(0.0125, abs=0.005)
    acc, chan, log = (np.mean([getattr(p, key) for p in found["diffuse"]]) for key in ("acc", "chan", "log"))
    assert log > acc > chan and log == pytest.approx(0.117, abs=0.025) and acc == pytest.approx(0.087, abs=0.025)


def test_arms_that_are_not_twins_are_no_sequence_of_bets():
    q = np.full(4, 0.5)
    with pytest.raises(InputError, match="same order"):
        TwinScores(q, q, (0, 1, 2, 3), (3, 1, 0, 2))
    with pytest.raises(InputError, match="counts once"):
        TwinScores.of(q, q, [0, 0, 1, 2])
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        TwinScores.of(q + 1, q, range(4))
    assert log_bits(TwinScores.of(q, q, range(4)), DELTA) == 0


def test_betting_refuses_what_it_cannot_bet_on():
    for values, delta in (([], 0.05), ([2.0], 0.05), ([0.5], 0.0)):
        with pytest.raises(InputError):
            betting_lower(values, 0.0, 1.0, delta)
    assert betting_lower([0.0] * 50, 0.0, 1.0, DELTA) == 0


@given(st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_no_point_of_the_box_has_more_or_less_than_its_bounds(hits):
    box = Box.of(hits, (40, 40), DELTA)
    for t in np.linspace(*box.tpr, 7):
        for f in np.linspace(*box.fpr, 7):
            assert box.least_bits - 1e-9 <= channel(float(t), float(f)) <= box.most_bits + 1e-9


@pytest.mark.parametrize("guesses, eps", [(3865, 0.02), (1718, 0.03), (619, 0.05), (155, 0.10)])
def test_a_coin_is_shown_to_be_one_with_the_power_of_the_table(guesses, eps):
    """Section 8: the upper test alone has 80 % power where the truth is 1/2, so both together have 60 %."""
    counts = np.arange(guesses // 2 - 200, guesses // 2 + 201).clip(0, guesses)
    mass = {rate: binom.pmf(np.unique(counts), guesses, rate) for rate in (0.5, 0.5 + eps, 0.5 - eps)}
    upper = np.array([most_rate(int(hits), guesses, DELTA) - 0.5 < eps for hits in np.unique(counts)])
    both = np.array([equivalence(int(hits), guesses, DELTA) < eps for hits in np.unique(counts)])
    assert mass[0.5][upper].sum() == pytest.approx(0.8, abs=0.04)
    assert mass[0.5][both].sum() == pytest.approx(0.6, abs=0.07)
    assert max(mass[0.5 + eps][both].sum(), mass[0.5 - eps][both].sum()) <= DELTA  # the side that must fail


def test_a_poor_detector_cannot_promise_a_low_rate():
    point = OperatingPoint(
        threshold=0.0, sensitivity=clopper_pearson(2630, 10_000), specificity=clopper_pearson(10_000, 10_000), n=20_000
    )
    found = corrected([False] * 500, point, "nude", seed=0, delta=DELTA)
    assert found.low == 0 and 0.025 < found.high < 0.045
    base = corrected([True] * 130 + [False] * 370, point, "nude", seed=0, delta=DELTA)
    low, high = presence(base, found)
    assert 0.7 < low < high <= 1.0
    low, high = presence(found, found)
    assert low < 0 < high


@pytest.mark.parametrize(
    "q, nats, p",
    [(0.001, 0.01, 0.0082), (0.001, 0.1, 0.038), (0.001, 0.5, 0.128), (0.01, 0.1, 0.081), (0.01, 1.0, 0.36)],
)
def test_what_an_event_can_rise_to_is_the_table(q, nats, p):
    assert inverse_divergence(q, nats) == pytest.approx(p, rel=0.02)
    assert divergence(inverse_divergence(q, nats), q) == pytest.approx(nats, rel=1e-6)
    assert divergence(0.5, 0.0) == float("inf") and inverse_divergence(0.0, 5.0) == pytest.approx(0, abs=1e-12)


def test_impossible_probabilities_are_refused():
    for call in (lambda: entropy(1.2), lambda: channel(-0.1, 0.5), lambda: shannon(np.array([0.5]), np.array([1.0]))):
        with pytest.raises(InputError):
            call()
    assert accuracy_bits(40, 100, DELTA) == 0 == channel_bits((3, 9), (50, 50), DELTA)
