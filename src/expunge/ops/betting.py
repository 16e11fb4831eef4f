"""Confidence bounds for the mean of bounded observations, by betting against each candidate mean."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from expunge.core.errors import InputError

CAUTION = 0.75  # share of the largest admissible stake: capital never reaches zero
HALVINGS = 40


def betting_lower(values: Sequence[float] | Float[np.ndarray, "n"], low: float, high: float, delta: float) -> float:
    """Give a lower confidence bound for the mean of independent values in [low, high], in their order.

    A bet against the mean m has capital prod_i (1 + s_i (x_i - m)) with x in [0, 1] and predictable stakes
    s_i = min(sqrt(2 ln(1 / delta) / (n v_{i-1})), 0.75 / m), v the running variance. Under a true mean of at most m it
    is a supermartingale, so it ever reaches 1 / delta with probability at most delta (Ville). The bound is the largest
    rejected m, found by bisection: capital falls with m. Raises InputError for no values, values out of range or a
    delta outside (0, 1). Source: Waudby-Smith and Ramdas (arXiv:2010.09686, section 4).
    """
    x = np.asarray(values, dtype=float)
    if not len(x) or not low < high or not ((x >= low) & (x <= high)).all():
        raise InputError(f"betting needs values in [{low}, {high}], got {len(x)} of them: {_range(x)}")
    if not 0 < delta < 1:
        raise InputError(f"delta {delta} is not between 0 and 1")
    x = (x - low) / (high - low)
    stakes = np.sqrt(2 * np.log(1 / delta) / (len(x) * _running_variance(x)))
    least, most = 0.0, 1.0
    if not _rejected(x, stakes, least, delta):
        return low
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        least, most = (middle, most) if _rejected(x, stakes, middle, delta) else (least, middle)
    return low + (high - low) * least


def _rejected(x: Float[np.ndarray, "n"], stakes: Float[np.ndarray, "n"], mean: float, delta: float) -> bool:
    """Whether betting against this mean ever multiplied the capital by 1 / delta; true of all smaller means then."""
    bets = np.minimum(stakes, CAUTION / max(mean, 1e-9))
    return bool(np.cumsum(np.log1p(bets * (x - mean))).max() >= np.log(1 / delta))


def _running_variance(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """v_{i-1} from the values before i, shrunk towards 1/4: (1/4 + sum (x_j - mean_j)^2) / i."""
    count = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (count + 1)
    after = (0.25 + np.cumsum((x - mean) ** 2)) / (count + 1)
    return np.concatenate([[0.25], after[:-1]])


def _range(x: Float[np.ndarray, "n"]) -> str:
    return f"{x.min()} to {x.max()}" if len(x) else "none"
