"""Path-KL on a linear-Gaussian chain whose divergences are known, and where it must refuse."""

import numpy as np
import pytest

from expunge.core.errors import InputError
from expunge.leakage.information import divergence
from expunge.leakage.path import PathBound, capped_divergence, path_divergence

NOISE = np.array([0.5, 0.4, 0.3, 0.2])


def walk(rng, n, shift, follow, noise=NOISE):
    """x <- x / 2 + shift + noise, and the gap of the other arm's mean at every step along the way."""
    x, gaps = rng.normal(size=n), []
    for spread in noise:
        gaps.append(np.full(n, abs(shift - follow)) * (1 + 0.1 * np.tanh(x)))
        x = x / 2 + shift + 0.1 * (shift - follow) * np.tanh(x) + spread * rng.normal(size=n)
    return x, np.stack(gaps, axis=1)


def ends(noise=NOISE):
    """Mean weight of a constant shift and variance of the last x of the linear chain."""
    weight, variance = 0.0, 1.0
    for spread in noise:
        weight, variance = weight / 2 + 1, variance / 4 + spread**2
    return weight, variance


@pytest.mark.parametrize("shift", [0.01, 0.05, 0.2])
def test_the_path_bound_is_above_the_exact_divergence(shift):
    gaps = np.full((100, len(NOISE)), shift)
    weight, variance = ends()
    exact = (weight * shift) ** 2 / (2 * variance)
    bound = path_divergence(gaps, NOISE)
    assert exact < bound == pytest.approx(float((shift**2 / (2 * NOISE**2)).sum()))
    both = PathBound(bound, bound)
    z = np.random.default_rng(0).normal(weight * shift, variance**0.5, 40_000)
    posterior = 1 / (1 + np.exp(-(z - weight * shift / 2) * weight * shift / variance))
    information = 1 + float(np.log2(posterior).mean())
    assert information - 0.01 <= both.most_bits < 1 and not both.vacuous


def test_gaps_that_depend_on_the_state_are_averaged_over_the_arm_they_start_from():
    _, gaps = walk(np.random.default_rng(1), 4000, 0.2, 0.0)
    found = path_divergence(gaps, NOISE)
    assert found == pytest.approx(float((gaps**2 / (2 * NOISE**2)).sum(1).mean()))
    assert found < capped_divergence(gaps.max(0), NOISE)


def test_equal_arms_leak_nothing():
    bound = PathBound(path_divergence(np.zeros((5, 4)), NOISE), 0.0)
    assert bound.most_bits == 0 and bound.event(0.01) == pytest.approx(0.01, abs=1e-9)


def test_a_wide_gap_says_nothing_and_says_so():
    bound = PathBound(path_divergence(np.full((5, 4), 100.0), NOISE), 1e4)
    assert bound.vacuous and bound.most_bits == 1


@pytest.mark.parametrize("noise, word", [(np.zeros(4), "all"), (np.array([0.5, 0.4, 0.3, 0.0]), "1 of 4")])
def test_samplers_without_noise_are_refused(noise, word):
    with pytest.raises(InputError, match=f"stochastic sampler.*{word}"):
        path_divergence(np.ones((3, 4)), noise)


def test_no_event_rises_above_its_bound():
    bound = PathBound(0.1, 0.1)
    top = bound.event(0.01)
    assert divergence(top, 0.01) == pytest.approx(0.1, rel=1e-6) and top == pytest.approx(0.081, abs=1e-3)
