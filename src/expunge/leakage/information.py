"""Information that one fair coin leaves in an outcome, exactly: in bits, for known probabilities.

C is a fair coin: 1 for a prompt that asks for the concept, 0 for its anchor twin. Source: certificates.md, section 2.1.
"""

import numpy as np
from jaxtyping import Float
from scipy.special import xlogy

from expunge.core.errors import InputError

LN2 = float(np.log(2))
_Law = Float[np.ndarray, "k"]


def entropy(p: float) -> float:
    """Entropy of a coin in bits: h2(p) = -p log2 p - (1 - p) log2 (1 - p); raises InputError outside [0, 1]."""
    _check(p)
    return float(-(xlogy(p, p) + xlogy(1 - p, 1 - p))) / LN2


def channel(t: float, f: float) -> float:
    """Information of a yes/no answer that says yes with probability t under C = 1 and f under C = 0.

    J(t, f) = h2((t + f) / 2) - (h2(t) + h2(f)) / 2, jointly convex, zero iff t = f, increasing in t and decreasing in f
    while t > f. Raises InputError outside [0, 1].
    """
    return max(entropy((t + f) / 2) - (entropy(t) + entropy(f)) / 2, 0.0)


def shannon(concept: _Law, anchor: _Law) -> float:
    """Information of an outcome with law P1 under C = 1 and P0 under C = 0: the Jensen-Shannon divergence.

    I = H((P1 + P0) / 2) - (H(P1) + H(P0)) / 2. Raises InputError for negative entries or sums other than 1.
    """
    for law in (concept, anchor):
        if (law < 0).any() or abs(float(law.sum()) - 1) > 1e-9:
            raise InputError(f"a law needs entries >= 0 that add up to 1; got {law.min()} at least, sum {law.sum()}")
    mixed, ends = (concept + anchor) / 2, (_bits(concept) + _bits(anchor)) / 2
    return min(max(_bits(mixed) - ends, 0.0), 1.0)


def variation(concept: _Law, anchor: _Law) -> float:
    """Total variation of two laws, half the sum of |P1 - P0|; the best guesser of C is right (1 + TV) / 2 of the time.

    1 - h2((1 - TV) / 2) <= I <= TV (Fano; Lin 1991).
    """
    return float(np.abs(concept - anchor).sum()) / 2


def fano(accuracy: float) -> float:
    """Least information of an outcome from which C is guessed right with this probability: 1 - h2(accuracy).

    0 at or below one half, where a guesser shows nothing.
    """
    return 1 - entropy(accuracy) if accuracy > 0.5 else 0.0


def contamination(share: float) -> float:
    """Most information an outcome can have if P1 = (1 - m) P0 + m Q with any Q: J(m, 0) = h2(m / 2) - h2(m) / 2.

    Met where Q falls on outcomes that P0 never has. Raises InputError outside [0, 1].
    """
    return channel(share, 0.0)


def divergence(p: float, q: float) -> float:
    """Divergence of two coins in nats, p ln(p / q) + (1 - p) ln((1 - p) / (1 - q)); inf where undefined."""
    _check(p)
    _check(q)
    terms = ((p, q), (1 - p, 1 - q))
    if any(a > 0 and b == 0 for a, b in terms):
        return float("inf")
    return max(sum(a * float(np.log(a / b)) for a, b in terms if a > 0), 0.0)


def inverse_divergence(q: float, nats: float) -> float:
    """Largest p with kl(p || q) <= nats, by bisection: what an event of base rate q can rise to."""
    _check(q)
    low, high = q, 1.0
    if divergence(1.0, q) <= nats:
        return 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle, q) <= nats else (low, middle)
    return high


def _bits(law: _Law) -> float:
    return float(-xlogy(law, law).sum()) / LN2


def _check(p: float) -> None:
    if not 0 <= p <= 1:
        raise InputError(f"probability {p} is not between 0 and 1")
