"""Twins, heads, controls: what they find, and what they must not find."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import kstest

from expunge.core.errors import InputError
from expunge.leakage.family import family_bits, least_risk, slack_bits
from expunge.leakage.heads import accuracy_p, calibrated, cosine_features, log_loss, risk, stacked, trained
from expunge.leakage.information import shannon
from expunge.leakage.lower import TwinScores, portfolio
from expunge.leakage.pipeline import Look, Spikes, attribution, base_heads, boxes, look_for_leak, null_p, shuffled
from expunge.leakage.twins import PAIRS, Split, check_frames, digest, draw_seed, frames, twins
from expunge.suites.load import catalogue
from expunge.suites.load import load as load_suite

DELTA = 0.05
N = 200
STYLES, GROUNDS = ("flat", "ink", "3d"), ("green", "blue", "gray")


def look(rng, shift=0.0, fires=0.01, n=N):
    """Six numbers per picture, of which the first moves with the concept; a detector that errs 1 in 100."""
    x = rng.normal(size=(n, 6))
    x[:, 0] += shift
    return Look({"numbers": x}, {"judge": rng.random(n) < fires})


def test_twins_differ_in_the_concept_alone_and_each_sentence_comes_once():
    pairs = twins(frames(STYLES, GROUNDS), ("red berry", "strawberry"), "apple", "quick", 0)
    assert len(pairs) == PAIRS["quick"] == len({twin.anchor for twin in pairs})
    for twin in pairs:
        phrase = next(p for p in ("red berry", "strawberry") if p in twin.concept)
        assert twin.concept.replace(phrase, "apple") == twin.anchor != twin.concept
    assert {"red berry", "strawberry"} == {p for t in pairs for p in ("red berry", "strawberry") if p in t.concept}
    again = twins(frames(STYLES, GROUNDS), ("red berry", "strawberry"), "apple", "quick", 0)
    assert digest(again) == digest(pairs) != digest(twins(frames(STYLES, GROUNDS), ("a b",), "apple", "quick", 0))


def test_the_suites_words_make_enough_sentences_for_the_standard_level_and_too_few_for_an_audit():
    """The page and the help say so: 2100."""
    for suite in map(load_suite, catalogue()):
        styles, grounds = ({getattr(case, key) for case in suite.cases} - {""} for key in ("style", "background"))
        assert PAIRS["standard"] <= len(set(frames(sorted(styles), sorted(grounds)))) == 2100 < PAIRS["audit"]
    assert all(line.count("{}") == 1 for line in frames(STYLES, GROUNDS))


@pytest.mark.parametrize(
    "lines, phrases, anchor, word",
    [
        (["a {}"], ["cat"], "dog", "1 prompts are too few for level 'quick', which needs 250"),
        ([f"{{}} {i}" for i in range(250)], ["Dog", "cat"], "dog", "phrase of the concept itself"),
    ],
)
def test_what_cannot_be_twinned_is_refused(lines, phrases, anchor, word):
    with pytest.raises(InputError, match=word):
        twins(lines, phrases, anchor, "quick", 0)
    with pytest.raises(InputError, match=r"one \{\}"):
        check_frames(["a photo"])
    assert check_frames(["a  {}", "", "a {}"]) == ("a {}",)


def test_splits_share_no_pair_and_seeds_do_not_know_the_concept():
    split = Split.of(100, 3)
    assert (len(split.train), len(split.calibrate), len(split.test)) == (50, 20, 30)
    assert sorted(split.train + split.calibrate + split.test) == list(range(100))
    assert split != Split.of(100, 4)
    seeds = [draw_seed(0, arm, pair) for arm in ("concept", "anchor") for pair in range(500)]
    assert len(set(seeds)) == 1000 and min(seeds) >= 0 and max(seeds) < 2**31


def test_a_leak_is_found_and_its_bound_stays_below_the_truth():
    """Unit-variance shift of 2: 0.486 bits."""
    rng, split = np.random.default_rng(0), Split.of(600, 0)
    found = look_for_leak(look(rng, 2.0, n=600), look(rng, n=600), split, DELTA)
    assert 0.15 < found.bits < 0.486
    assert accuracy_p(found.scores, 199, 0) == 1 / 200


def test_of_equal_arms_nothing_is_found():
    rng, split = np.random.default_rng(1), Split.of(N, 0)
    found = look_for_leak(look(rng), look(rng), split, DELTA)
    assert found.bits == 0 and accuracy_p(found.scores, 199, 0) > 0.01


def test_a_leak_only_the_detector_sees_counts():
    rng, split = np.random.default_rng(2), Split.of(N, 0)
    concept, anchor = look(rng, fires=0.3), look(rng)
    found = look_for_leak(concept, anchor, split, DELTA)
    assert found.bounds.bits == 0 and found.bits == found.boxes["judge"].least_bits > 0.02
    assert boxes(concept, anchor, DELTA / 2) == found.boxes


def test_the_test_pairs_decide_nothing_before_they_are_read():
    """Whatever stands in them, the head, its temperature and its threshold are the same."""
    rng, split = np.random.default_rng(3), Split.of(N, 0)
    concept, anchor = look(rng, 1.0).features["numbers"], look(rng).features["numbers"]
    first = trained(concept, anchor, split, DELTA)
    spoiled = concept.copy()
    spoiled[list(split.test)] = 99.0
    second = trained(spoiled, anchor, split, DELTA)
    assert (first.w == second.w).all() and (first.temperature, first.threshold) == (
        second.temperature,
        second.threshold,
    )
    spoiled = concept.copy()
    spoiled[list(split.train)] += 5.0
    assert not (trained(spoiled, anchor, split, DELTA).w == first.w).all()


def test_temperature_heals_overconfidence():
    rng, split = np.random.default_rng(4), Split.of(N, 0)
    concept, anchor = rng.normal(size=(N, 60)) + 0.05, rng.normal(size=(N, 60))
    head = trained(concept, anchor, split, DELTA)
    assert head.temperature > 1.5
    hot = log_loss(head.on(concept, anchor, split.test))
    cold = calibrated(head, concept, anchor, split.train, DELTA)  # calibrated where it was fitted: the mistake
    assert hot < log_loss(cold.on(concept, anchor, split.test)) and hot < 1.1


def test_what_is_left_is_called_the_concept_only_if_the_base_models_head_sees_it():
    """A visible replacement along another direction: distinguishable, but no evidence of the concept."""
    rng, split = np.random.default_rng(5), Split.of(600, 0)
    base = base_heads(look(rng, 3.0, n=600), look(rng, n=600), split, DELTA)
    replaced = look(rng, n=600)
    replaced.features["numbers"][:, 1] += 3.0
    anchor = look(rng, n=600)
    assert look_for_leak(replaced, anchor, split, DELTA, base).bits > 0.3
    assert attribution(replaced, anchor, split, DELTA, base)[2].bits == 0
    assert attribution(look(rng, 3.0, n=600), anchor, split, DELTA, base)[2].bits > 0.3


def test_the_detection_limit_falls_with_the_share_and_blind_observers_have_none(monkeypatch):
    monkeypatch.setattr("expunge.leakage.pipeline.REPEATS", 6)
    rng, split = np.random.default_rng(6), Split.of(N, 0)
    concept, base_anchor, anchor, again = look(rng, 8.0, 0.98), look(rng), look(rng), look(rng)
    heads = base_heads(concept, base_anchor, split, DELTA)
    limit, powers = Spikes(anchor, again, concept, split, heads, DELTA).limit(0, (0.5, 0.2, 0.005))
    assert powers["0.5"] == 1.0 and limit in (0.5, 0.2) and powers["0.005"] < 0.8
    ordered = [powers[key] for key in sorted(powers, key=float)]
    assert all(a <= b + 0.15 for a, b in pairwise(ordered))
    blind = Spikes(anchor, again, look(rng), split, base_heads(look(rng), base_anchor, split, DELTA), DELTA)
    assert blind.limit(0, (0.2,)) == (None, {"0.2": pytest.approx(0, abs=0.2)})


def test_the_null_flags_a_harness_that_leaks_and_spares_one_that_does_not():
    rng, split = np.random.default_rng(7), Split.of(N, 0)
    assert null_p(look(rng, 1.5), look(rng), split, DELTA, 0) < 0.01
    assert null_p(look(rng), look(rng), split, DELTA, 0) > 0.01
    concept, anchor = look(rng, 3.0), look(rng)
    assert null_p(*shuffled(concept, anchor, 0), split, DELTA, 0) > 0.01
    both = shuffled(concept, anchor, 0)
    total = both[0].features["numbers"] + both[1].features["numbers"]
    assert np.allclose(total, concept.features["numbers"] + anchor.features["numbers"])


def jittered_p(scores, seed, jitter, permutations=199):
    """The permutation p-value with its ties broken at random: (#more + jitter (1 + #equal)) / (1 + permutations).

    With the arms exchanged the same tosses count "at most" in place of "at least".
    """
    least = round((1 + permutations) * accuracy_p(scores, permutations, seed)) - 1
    other = TwinScores.of(scores.anchor, scores.concept, scores.anchor_pairs)
    most = round((1 + permutations) * accuracy_p(other, permutations, seed)) - 1
    equal = least + most - permutations
    return (least - equal + jitter * (1 + equal)) / (1 + permutations)


def test_permutation_p_values_are_uniform():
    """Kolmogorov-Smirnov, two-sided; accuracies tie, so the p-values are jittered within their own ties."""
    rng, plain, jittered, leaking = np.random.default_rng(8), [], [], []
    for seed in range(400):
        q, jitter = rng.random((2, 60)), rng.random()
        scores = TwinScores.of(q[0], q[1], range(60))
        plain.append(accuracy_p(scores, 199, seed))
        jittered.append(jittered_p(scores, seed, jitter))
        leaking.append(jittered_p(TwinScores.of(q[0] ** 0.8, q[1], range(60)), seed, jitter))
    assert kstest(jittered, "uniform").pvalue > 0.01
    assert kstest(leaking, "uniform").pvalue < 1e-3  # the side that must fail: a small leak
    assert all(one <= other for one, other in zip(jittered, plain, strict=True))  # ties fall on the safe side
    assert kstest(plain, "uniform", alternative="greater").pvalue > 0.01  # never smaller than uniform: valid


def test_the_optimal_critics_donsker_varadhan_estimate_exceeds_the_truth_half_the_time():
    """Why no sample value of a neural estimator is a bound here: Gaussian with rho = .99, the exact critic."""
    rho, n, rng, runs = 0.99, 100, np.random.default_rng(9), 300
    truth = -0.5 * math.log(1 - rho**2)

    def critic(x, y):
        return -0.5 * math.log(1 - rho**2) - (rho**2 * (x**2 + y**2) - 2 * rho * x * y) / (2 * (1 - rho**2))

    over = 0
    for _ in range(runs):
        x, z = rng.normal(size=(2, n))
        y = rho * x + math.sqrt(1 - rho**2) * z
        independent = np.log(np.mean(np.exp(critic(x, rng.permutation(y)))))
        over += critic(x, y).mean() - independent > truth
    assert over / runs > 0.3


def test_heads_see_nothing_where_one_full_bit_is_hidden():
    """Halves of a random set of outcomes: I = 1 bit, and every head is at chance. So nobody may add "leakage ≤"."""
    rng, size = np.random.default_rng(10), 20_000
    order = rng.permutation(size)
    arms = np.zeros((2, size))
    arms[0, order[: size // 2]] = arms[1, order[size // 2 :]] = 2 / size
    assert shannon(arms[0], arms[1]) == pytest.approx(1)
    outcomes = rng.normal(size=(size, 6))
    concept, anchor = (outcomes[rng.choice(size, 300, p=law)] for law in arms)
    found = look_for_leak(Look({"numbers": concept}, {}), Look({"numbers": anchor}, {}), Split.of(300, 0), DELTA)
    assert found.bits == 0


def test_the_family_bound_holds_for_every_head_in_the_ball():
    rng = np.random.default_rng(11)
    x, signs = rng.normal(size=(80, 4)), np.repeat([1.0, -1.0], 40)
    x[:40, 0] += 1.0
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for norm in (0.5, 3.0):
        bound = least_risk(x, signs, norm)
        best = math.inf
        for _ in range(400):
            w = rng.normal(size=4)
            w *= norm * rng.random() ** 0.25 / np.linalg.norm(w)
            loss, _, _ = risk(w, x, signs)
            best = min(best, loss)
            assert loss >= bound - 1e-9
        assert best - bound < 0.02  # and it is tight
    assert least_risk(x, signs, 3.0) < least_risk(x, signs, 0.5) < math.log(2)


@pytest.mark.parametrize(
    "norm, n, bits", [(1.0, 2000, 0.116), (1.0, 20_000, 0.037), (3.0, 2000, 0.314), (10.0, 20_000, 0.329)]
)
def test_the_slack_is_the_table(norm, n, bits):
    assert slack_bits(norm, n, DELTA) == pytest.approx(bits, abs=1.5e-3)


def test_the_family_bound_is_above_what_a_head_finds_and_says_nothing_at_large_norms():
    rng = np.random.default_rng(12)
    concept, anchor = rng.normal(size=(400, 5)) + 0.8, rng.normal(size=(400, 5))
    bound = family_bits(concept, anchor, 1.0, DELTA)
    assert 0.17 < bound < 0.6
    assert family_bits(concept, anchor, 10.0, DELTA) == 1
    assert family_bits(anchor, anchor[::-1], 1.0, DELTA) == pytest.approx(slack_bits(1.0, 800, DELTA), abs=1e-3)
    with pytest.raises(InputError, match="equally many"):
        family_bits(concept, anchor[:10], 1.0, DELTA)


def test_batches_of_any_length_are_joined_by_extractor() -> None:
    parts = [{"pixels": np.full((n, 3), float(n)), "judge": np.full((n, 5), float(n))} for n in (64, 8)]
    joined = stacked(parts)
    assert {name: x.shape for name, x in joined.items()} == {"pixels": (72, 3), "judge": (72, 5)}
    assert joined["judge"][:, 0].tolist() == [64.0] * 64 + [8.0] * 8


def test_coarse_cosines_keep_the_mean_and_drop_the_grain():
    rng = np.random.default_rng(13)
    images = rng.random((3, 3, 16, 16))
    found = cosine_features(images, 4)
    assert found.shape == (3, 48)
    assert found[:, 0] == pytest.approx(images[:, 0].mean((1, 2)) * 16)
    grain = np.indices((16, 16)).sum(0) % 2 - 0.5
    assert np.abs(cosine_features(images + grain, 4) - found).max() < 0.7  # 8 in the highest coefficient


def test_the_portfolio_never_reads_the_order_of_arms_apart():
    rng = np.random.default_rng(14)
    q = rng.random((2, 50))
    order = rng.permutation(50)
    scores = TwinScores.of(q[0], q[1], range(50))
    moved = TwinScores.of(q[0][order], q[1][order], order.tolist())
    assert portfolio(scores, 0.6, DELTA).acc == portfolio(moved, 0.6, DELTA).acc
