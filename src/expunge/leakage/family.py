"""F-certificate: the most that any linear head of bounded norm on frozen features can learn about C.

Predictive V-information (Xu et al., arXiv:2002.10689) of logistic heads; another extractor may see more, so a sentence
about it names extractor and norm. Source: certificates.md, section 4.2.
"""

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from expunge.core.errors import InputError
from expunge.leakage.heads import risk
from expunge.leakage.information import LN2

_Features = Float[np.ndarray, "n d"]
_Signs = Float[np.ndarray, "n"]


def slack_bits(norm: float, n: int, delta: float) -> float:
    """How far the risk on the sample can be above the family's best: (2 B / sqrt(n) + ln(1 + e^B) r) / ln 2 bits.

    r = sqrt(ln(1 / delta) / (2 n)); n counts the images of both arms. Rademacher complexity B / sqrt(n) of the heads.
    """
    deviation = float(np.log1p(np.exp(norm))) * float(np.sqrt(np.log(1 / delta) / (2 * n)))
    return (2 * norm / float(np.sqrt(n)) + deviation) / LN2


def family_bits(concept: _Features, anchor: Float[np.ndarray, "m d"], norm: float, delta: float) -> float:
    """Upper bound in bits on the V-information about C of heads w with |w| <= B on features scaled to unit norm.

    1 - (min_w risk) / ln 2 + slack, at most 1, at least 0. Nothing is trained away: the minimum is bounded below by
    convexity. No intercept, so the family is exactly the ball. Raises InputError for arms of unequal size.
    """
    if len(concept) != len(anchor) or not len(concept):
        raise InputError(f"arms hold {len(concept)} and {len(anchor)} images; give equally many, one at least")
    x, signs = np.concatenate([concept, anchor]), np.repeat([1.0, -1.0], len(concept))
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    bits = 1 - least_risk(x, signs, norm) / LN2 + slack_bits(norm, len(x), delta)
    return min(max(bits, 0.0), 1.0)


def least_risk(x: _Features, signs: _Signs, norm: float) -> float:
    """Certified lower bound, in nats, on the mean logistic loss of any w with |w| <= norm.

    R convex gives R(w) >= R(v) + g.(w - v) >= R(v) - g.v - B |g| for every w in the ball and any v in it: the bound
    holds whether or not the search for v converged, and is tight where it did.
    """
    best = 0.0
    penalty, low, high = 1.0, 1e-8, 1e4
    for _ in range(30):  # the penalty whose optimum lies on the sphere, or the least one if the optimum is inside
        penalty = float(np.sqrt(low * high))
        v = _fitted(x, signs, penalty)
        size = float(np.linalg.norm(v))
        low, high = (penalty, high) if size > norm else (low, penalty)
        v = v * min(1.0, norm / max(size, 1e-12))
        loss, slope, _ = risk(v, x, signs)
        best = max(best, loss - float(slope @ v) - norm * float(np.linalg.norm(slope)))
    return best


def _fitted(x: _Features, signs: _Signs, penalty: float) -> Float[np.ndarray, "d"]:
    def penalized(w: Float[np.ndarray, "d"]) -> tuple[float, Float[np.ndarray, "d"]]:
        loss, slope, _ = risk(w, x, signs)
        return loss + penalty * float(w @ w) / 2, slope + penalty * w

    found: Float[np.ndarray, d] = minimize(penalized, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
    return found
