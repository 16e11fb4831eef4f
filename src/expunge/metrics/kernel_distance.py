"""Kernel distance (squared MMD) between two arms on named features."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from expunge.core.measure import Metric, Samples
from expunge.core.records import Estimate
from expunge.metrics._features import Extractor, left_out, paired


@dataclass(frozen=True, kw_only=True)
class KernelDistance(Metric):
    """Squared maximum mean discrepancy of two arms under the cubic kernel; what KID is on Inception features.

    mmd^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
    k(x, y) = (x.y / d + 1)^3.

    Unbiased for independent arms at any count, so it may be negative. Two arms drawn from the same seeds are not
    independent: equal arms give a negative value instead of 0. Source: Binkowski et al., arXiv:1801.01401.
    """

    higher_is_better: ClassVar[bool] = False

    extractor: Extractor

    def compute(self, got: Samples, base: Samples) -> Estimate:
        """Give the distance with a jackknife interval over prompts; raises InputError for unequal cases."""
        pair = paired(self.extractor, got, base)
        prompts = [case.prompt for case in got.cases]
        return left_out(kernel_distance, pair, prompts, self.extractor.name, floor=None)


def kernel_distance(one: Float64[Tensor, "n d"], two: Float64[Tensor, "m d"]) -> float:
    """Unbiased squared MMD of two feature sets under k(x, y) = (x.y / d + 1)^3."""
    within = _off_diagonal_mean(_kernel(one, one)) + _off_diagonal_mean(_kernel(two, two))
    return float(within - 2 * _kernel(one, two).mean())


def _kernel(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(gram: Float64[Tensor, "n n"]) -> Float64[Tensor, ""]:
    n = len(gram)
    return (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
