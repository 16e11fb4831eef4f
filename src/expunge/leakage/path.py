"""P-certificate: a stochastic sampler cannot reveal more than its noise hides, summed along the path.

Both arms step with N(mu_t(x, prompt), s_t^2 I), the same s_t, from the same law of noise. Chain rule and data
processing: KL(X1 || X0) <= sum_t E |mu_t(x, p) - mu_t(x, a(p))|^2 / (2 s_t^2), the expectation over paths of arm 1.
Source: certificates.md, section 7; in the spirit of NAF's divergence to a safe model (arXiv:2302.10870).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from expunge.core.errors import InputError
from expunge.leakage.information import LN2, inverse_divergence


@dataclass(frozen=True)
class PathBound:
    """Divergences between the two arms' paths in nats, both ways, and the bound on I(C; X) in bits they give."""

    kl10: float
    kl01: float

    @property
    def most_bits(self) -> float:
        """I <= min((KL10 + KL01) / (4 ln 2), sqrt(1 - exp(-min KL)), 1).

        Convexity of KL; Bretagnolle and Huber for the total variation.
        """
        least = min(self.kl10, self.kl01)
        variation = float(np.sqrt(-np.expm1(-least)))
        return min((self.kl10 + self.kl01) / (4 * LN2), variation, 1.0)

    @property
    def vacuous(self) -> bool:
        """Whether the bound says nothing: a coin has one bit."""
        return self.most_bits >= 1

    def event(self, base_rate: float) -> float:
        """How often anything at all can happen under C = 1 that happens with `base_rate` under C = 0."""
        return inverse_divergence(base_rate, self.kl10)


def path_divergence(gaps: Float[np.ndarray, "n t"], noise: Float[np.ndarray, "t"]) -> float:
    """Sum over steps of the mean squared gap of step means over twice the step's noise variance, in nats.

    gaps: |mu_t(x_t, p) - mu_t(x_t, a(p))| per path and step, on paths of the arm the divergence starts from, guidance
    included. Raises InputError where a step has no noise of its own: a deterministic sampler, or the usual noiseless
    last step, reveals whatever its mean differs by, and the divergence is infinite.
    """
    if not len(noise) or not (noise > 0).all():
        silent = "all" if not (noise > 0).any() else f"{int((noise <= 0).sum())} of {len(noise)}"
        raise InputError(
            f"path-KL needs a stochastic sampler with noise in every step; {silent} of its steps have none"
        )
    return float((gaps**2 / (2 * noise**2)).sum(1).mean())


def capped_divergence(caps: Float[np.ndarray, "t"], noise: Float[np.ndarray, "t"]) -> float:
    """Bound for a sampler that itself caps each step's gap: holds for every prompt and path, nothing is estimated."""
    return path_divergence(caps[None], noise)
