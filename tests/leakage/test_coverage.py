"""How often each bound is on the wrong side of the truth: sampled from laws whose information is known exactly."""

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import binomtest

from expunge.leakage.box import Box
from expunge.leakage.family import family_bits, least_risk
from expunge.leakage.information import LN2, channel, fano, shannon
from expunge.leakage.lower import TwinScores, log_bits, portfolio, scan_variation
from expunge.ops.betting import betting_lower

DELTA = 0.05
LAWS = {
    "equal coins": ([0.5, 0.5], [0.5, 0.5]),
    "rare and equal": ([0.98, 0.02], [0.98, 0.02]),
    "rare leak": ([0.94, 0.06], [0.998, 0.002]),
    "shift": ([0.2, 0.3, 0.5], [0.4, 0.3, 0.3]),
    "strong": ([0.9, 0.1], [0.1, 0.9]),
    "disjoint": ([1.0, 0.0], [0.0, 1.0]),
    "six": ([0.3, 0.3, 0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.2, 0.2, 0.2]),
}


def holds(wrong: Iterable[bool], delta: float = DELTA) -> bool:
    """Whether a bound that is wrong with probability delta would be wrong this often once in a thousand tests."""
    seen = list(wrong)
    return bool(binomtest(sum(seen), len(seen), delta, alternative="greater").pvalue > 1e-3)


def arrays(name):
    return tuple(np.array(law) for law in LAWS[name])


def laws(rng, k):
    return rng.dirichlet(np.full(k, 0.6)), rng.dirichlet(np.full(k, 0.6))


def drawn(rng, law1, law0, q, n):
    """A guesser that answers q[outcome], on n twin pairs."""
    one, two = (rng.choice(len(law), size=n, p=law) for law in (law1, law0))
    return TwinScores.of(q[one], q[two], range(n))


def bayes(p1, p0):
    return (p1 + 1e-9) / (p1 + p0 + 2e-9)


def lower_bounds(scores):
    """The four lower bounds, each at DELTA."""
    best = portfolio(scores, 0.6, 3 * DELTA)
    return best.acc, best.chan, best.log, fano((1 + scan_variation(scores, DELTA)) / 2)


def coverage(name, runs, n):
    (p1, p0), rng = arrays(name), np.random.default_rng(1)
    truth, q = shannon(p1, p0), bayes(p1, p0)
    found = np.array([lower_bounds(drawn(rng, p1, p0, q, n)) for _ in range(runs)])
    for column in found.T:
        assert holds(column > truth + 1e-9), (column > truth + 1e-9).mean()


@pytest.mark.parametrize("name", LAWS)
def test_lower_bounds_cover(name):
    """t = f is among the laws."""
    coverage(name, 400, 80)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_lower_bounds_cover_in_many_runs(name):
    coverage(name, 5000, 120)


def test_the_criterion_tells_a_bound_from_an_estimate():
    """The side that must fail: the sample's own channel is no bound, nor is one at four times delta."""
    (p1, p0), rng = arrays("shift"), np.random.default_rng(2)
    hits = rng.binomial(80, (p1[2], p0[2]), size=(400, 2)) / 80
    truth = channel(p1[2], p0[2])
    assert not holds(channel(t, f) > truth for t, f in hits)
    assert holds(rng.random(400) < DELTA) and not holds(rng.random(400) < 4 * DELTA)


@given(st.integers(0, 10_000))
def test_no_question_about_an_outcome_tells_more_than_the_outcome(seed):
    """Any yes-set of any two laws on at most six outcomes: J(t, f) <= I, met by the whole of a yes/no outcome."""
    rng = np.random.default_rng(seed)
    p1, p0 = laws(rng, int(rng.integers(2, 7)))
    yes = rng.random(len(p1)) < 0.5
    t, f = (min(float(law[yes].sum()), 1.0) for law in (p1, p0))
    assert channel(t, f) <= shannon(p1, p0) + 1e-9
    if len(p1) == 2 and yes.sum() == 1:
        assert channel(t, f) == pytest.approx(shannon(p1, p0), abs=1e-9)


def test_sampled_bounds_cover_on_random_laws():
    """Another law, another guesser and another threshold in every run."""
    rng, found = np.random.default_rng(3), []
    for _ in range(500):
        p1, p0 = laws(rng, int(rng.integers(2, 7)))
        q = bayes(p1, p0) if rng.random() < 0.5 else rng.random(len(p1))
        scores = drawn(rng, p1, p0, q, 60)
        parts = portfolio(scores, float(rng.random()), 3 * DELTA)
        found.append([bound > shannon(p1, p0) + 1e-9 for bound in (parts.acc, parts.chan, parts.log)])
    assert all(holds(column) for column in np.array(found).T)


@given(st.integers(0, 10_000))
def test_any_guesser_however_wrong_gives_a_bound(seed):
    """Expected clipped log-loss of an arbitrary q never exceeds the information."""
    rng = np.random.default_rng(seed)
    p1, p0 = laws(rng, int(rng.integers(2, 7)))
    q = np.clip(rng.random(len(p1)), 0.01, 0.99)
    expected = 1 + float((p1 * np.log2(q)).sum() + (p0 * np.log2(1 - q)).sum()) / 2
    assert expected <= shannon(p1, p0) + 1e-9


@pytest.mark.parametrize("name", ["equal coins", "rare leak", "shift", "strong"])
@pytest.mark.parametrize("guesser", ["random", "sure", "reversed"])
def test_the_log_bound_covers_whoever_guesses(name, guesser):
    """By betting on samples: q drawn anew, q of zeros and ones that the clip alone keeps finite, and q upside down."""
    (p1, p0), rng = arrays(name), np.random.default_rng(4)
    truth, wrong = shannon(p1, p0), []
    for _ in range(300):
        chance = rng.random(len(p1))
        q = {"random": chance, "sure": (chance > 0.5).astype(float), "reversed": 1 - bayes(p1, p0)}[guesser]
        wrong.append(log_bits(drawn(rng, p1, p0, q, 80), DELTA) > truth + 1e-9)
    assert holds(wrong)


@pytest.mark.parametrize("law", ["uniform", "coin", "skewed", "constant"])
def test_betting_bounds_hold_and_close_in(law):
    rng, runs, n = np.random.default_rng(4), 400, 300
    draw = {
        "uniform": lambda: rng.random(n),
        "coin": lambda: rng.random(n) < 0.5,
        "skewed": lambda: rng.beta(0.5, 4.5, n),
        "constant": lambda: np.full(n, 0.5),
    }[law]
    mean = 0.1 if law == "skewed" else 0.5
    bounds = np.array([betting_lower(draw().astype(float), 0.0, 1.0, DELTA) for _ in range(runs)])
    assert holds(bounds > mean)
    assert bounds.mean() > mean - {"uniform": 0.06, "coin": 0.09, "skewed": 0.05, "constant": 0.05}[law]
    wide = betting_lower(draw() * 4.0 - 3, -3.0, 1.0, DELTA)
    assert -3 < wide < 4 * mean - 3


@pytest.mark.parametrize(
    "t, f", [(0.5, 0.5), (0.02, 0.02), (0.3, 0.1), (0.1, 0.3), (0.95, 0.05), (0.0, 0.0), (0.05, 0.0)]
)
def test_the_box_encloses_what_the_detector_sees(t, f):
    rng, runs, n = np.random.default_rng(5), 400, 100
    boxes = [Box.of((int(rng.binomial(n, t)), int(rng.binomial(n, f))), (n, n), DELTA) for _ in range(runs)]
    assert holds(not box.least_bits <= channel(t, f) + 1e-12 <= box.most_bits + 2e-12 for box in boxes)
    assert np.mean([box.most_bits for box in boxes]) < 0.9


POINTS = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-0.6, 0.8], [0.0, -1.0]])
"""What an outcome looks like to the extractor: unit vectors."""


def information_of_heads(p1, p0, norm):
    """1 - min over |w| <= norm of the law's own risk, in bits: the figure that family_bits bounds."""
    x = POINTS[: len(p1)]

    def loss(angles):
        w = norm / (1 + np.exp(-angles[0])) * np.array([np.cos(angles[1]), np.sin(angles[1])])
        return float((p1 * np.logaddexp(0, -x @ w)).sum() + (p0 * np.logaddexp(0, x @ w)).sum()) / 2

    starts = [(radius, turn) for radius in (-2.0, 3.0, 12.0) for turn in (0.0, 2.0, 4.0)]
    return 1 - min(minimize(loss, start, method="Nelder-Mead").fun for start in starts) / LN2


def looked_at(name, rng, n=50):
    return tuple(POINTS[rng.choice(len(law), size=n, p=law)] for law in arrays(name))


def family_coverage(name, runs):
    """Upper, so it is wrong where it lies below."""
    truth, rng = information_of_heads(*arrays(name), 1.0), np.random.default_rng(6)
    assert holds(family_bits(*looked_at(name, rng), 1.0, DELTA) < truth - 1e-6 for _ in range(runs))


@pytest.mark.parametrize("name", ["equal coins", "rare leak", "shift", "strong", "disjoint", "six"])
def test_the_family_bound_covers(name):
    family_coverage(name, 15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["equal coins", "rare leak", "shift", "strong", "disjoint", "six"])
def test_the_family_bound_covers_in_many_runs(name):
    family_coverage(name, 400)


def test_the_samples_own_figure_is_no_bound_on_the_family():
    """The side that must fail: with the slack left out it lies below the truth about every other time."""
    truth, rng, signs = (
        information_of_heads(*arrays("strong"), 1.0),
        np.random.default_rng(7),
        np.repeat([1.0, -1.0], 50),
    )
    figures = [1 - least_risk(np.concatenate(looked_at("strong", rng)), signs, 1.0) / LN2 for _ in range(30)]
    assert not holds(figure < truth - 1e-6 for figure in figures)


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_heads_of_a_ball_know_no_more_than_there_is(seed):
    rng = np.random.default_rng(seed)
    p1, p0 = laws(rng, int(rng.integers(2, 7)))
    assert -1e-9 <= information_of_heads(p1, p0, 1.0) <= shannon(p1, p0) + 1e-9
