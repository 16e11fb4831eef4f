"""Lower bounds on I(C; X) from held-out guesses: valid for every joint law and every guesser, at a finite sample.

Guessers are fitted and tuned on other prompts than those counted here. Source: certificates.md, sections 2.2 to 2.6.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from expunge.core.errors import InputError
from expunge.leakage.information import channel, fano
from expunge.ops.betting import betting_lower
from expunge.ops.stats import clopper_pearson

CLIP = 0.01
"""tau: a posterior is kept inside [tau, 1 - tau], so that one confident mistake cannot cost everything."""

_Scores = Float[np.ndarray, "n"]
_Answers = Bool[np.ndarray, "n"]


@dataclass(frozen=True)
class TwinScores:
    """A guesser's q(C = 1 | image) for the two images of each twin pair, in one order of pairs.

    Raises InputError unless both arms name the same pairs in the same order, each once: the mean over a pair is what is
    independent between pairs, and arms shuffled on their own are no sequence of fair bets.
    """

    concept: _Scores
    anchor: _Scores
    concept_pairs: tuple[Hashable, ...]
    anchor_pairs: tuple[Hashable, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.concept), len(self.anchor), len(self.concept_pairs), len(self.anchor_pairs)}
        if len(sizes) != 1 or self.concept_pairs != self.anchor_pairs:
            raise InputError("the two arms must list the same twin pairs in the same order; these do not")
        if len(set(self.concept_pairs)) != len(self.concept_pairs) or not self.concept_pairs:
            raise InputError("each twin pair counts once, and there must be one at least")
        scores = np.concatenate([self.concept, self.anchor])
        if not ((scores >= 0) & (scores <= 1)).all():
            raise InputError(f"posteriors must lie in [0, 1], got {scores.min()} to {scores.max()}")

    @classmethod
    def of(cls, concept: _Scores, anchor: _Scores, pairs: Sequence[Hashable]) -> "TwinScores":
        """Join two arms whose rows answer to the same list of pairs."""
        return cls(concept, anchor, tuple(pairs), tuple(pairs))

    @property
    def correct(self) -> int:
        """How many of the 2 n images are guessed right, where a guess says C = 1 for q > 1/2."""
        return int((self.concept > 0.5).sum() + (self.anchor <= 0.5).sum())


@dataclass(frozen=True)
class Portfolio:
    """Three lower bounds that hold together, and their best: `bits`; `tv` is the least total variation."""

    acc: float
    chan: float
    log: float
    tv: float

    @property
    def bits(self) -> float:
        """The largest of the three."""
        return max(self.acc, self.chan, self.log)


def least_rate(hits: int, n: int, delta: float) -> float:
    """Lower end of a rate, wrong with probability at most delta: one-sided Clopper-Pearson."""
    return clopper_pearson(hits, n, 1 - 2 * delta).low


def most_rate(hits: int, n: int, delta: float) -> float:
    """Upper end of a rate, wrong with probability at most delta: one-sided Clopper-Pearson."""
    return clopper_pearson(hits, n, 1 - 2 * delta).high


def accuracy_bits(correct: int, guesses: int, delta: float) -> float:
    """L-acc: I >= 1 - h2(a_lo), a_lo the least accuracy; best for small diffuse shifts.

    With as many images in each arm the count is Poisson-binomial, for which the binomial tail errs on the safe side
    above its mean (Hoeffding 1956).
    """
    return fano(least_rate(correct, guesses, delta))


def equivalence(correct: int, guesses: int, delta: float) -> float:
    """Give the least eps for which two one-sided tests at delta each show an accuracy within 1/2 +- eps.

    max(a_hi - 1/2, 1/2 - a_lo). About this guesser alone: another may do better, so it bounds no information.
    """
    return max(most_rate(correct, guesses, delta) - 0.5, 0.5 - least_rate(correct, guesses, delta))


def channel_bits(hits: tuple[int, int], n: tuple[int, int], delta: float) -> float:
    """L-chan: I >= J(t_lo, f_hi) if t_lo > f_hi, else 0, each end at delta / 2; best for rare leaks.

    hits and n: of the concept arm and of the anchor arm. Bonferroni: holds even where the arms share seeds.
    """
    t = least_rate(hits[0], n[0], delta / 2)
    f = most_rate(hits[1], n[1], delta / 2)
    return channel(t, f) if t > f else 0.0


def log_bits(scores: TwinScores, delta: float, clip: float = CLIP) -> float:
    """L-log: I >= 1 + E log2 q(C | X), by betting on z = 1 + (log2 q(1 | x1) + log2 q(0 | x0)) / 2, one z per pair.

    q clipped to [tau, 1 - tau] keeps z in [1 + log2 tau, 1 + log2(1 - tau)]; any q gives a bound. Best for strong or
    diffuse leaks.
    """
    q1, q0 = np.clip(scores.concept, clip, 1 - clip), np.clip(scores.anchor, clip, 1 - clip)
    z = 1 + (np.log2(q1) + np.log2(1 - q0)) / 2
    low, high = 1 + np.log2(clip), 1 + np.log2(1 - clip)
    return max(betting_lower(np.clip(z, low, high), float(low), float(high), delta), 0.0)


def scan_variation(scores: TwinScores, delta: float) -> float:
    """L-tv: TV >= sup_s (F0(s) - F1(s)) - 2 sqrt(ln(2 / delta) / (2 n)) over thresholds s, the same for all of them.

    One-sided Dvoretzky-Kiefer-Wolfowitz with Massart's constant, one half of delta for each arm; no threshold is
    chosen, so none can be chosen badly.
    """
    edges = np.concatenate([scores.concept, scores.anchor])
    below = [np.searchsorted(np.sort(arm), edges, side="right") / len(arm) for arm in (scores.anchor, scores.concept)]
    slack = 2 * float(np.sqrt(np.log(2 / delta) / (2 * len(scores.concept))))
    return max(float((below[0] - below[1]).max()) - slack, 0.0)


def portfolio(scores: TwinScores, threshold: float, delta: float) -> Portfolio:
    """Run L-acc, L-chan and L-log at delta / 3 each; they hold together with 1 - delta.

    A guess says C = 1 where q > 1/2, the yes/no channel fires where q >= threshold, chosen on the calibration split.
    """
    n, third, correct = len(scores.concept), delta / 3, scores.correct
    hits = int((scores.concept >= threshold).sum()), int((scores.anchor >= threshold).sum())
    return Portfolio(
        acc=accuracy_bits(correct, 2 * n, third),
        chan=channel_bits(hits, (n, n), third),
        log=log_bits(scores, third),
        tv=max(2 * least_rate(correct, 2 * n, third) - 1, 0.0),
    )
