"""Fréchet distance between two arms on named features."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from expunge.core.measure import Metric, Samples
from expunge.core.records import Estimate
from expunge.metrics._features import Extractor, left_out, paired


@dataclass(frozen=True, kw_only=True)
class FrechetDistance(Metric):
    """Distance of two Gaussians fitted to the features of two arms on the same cases.

    d = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in squared units of the features; 0 for equal arms.
    It is biased upward for few images and means something only beside the same extractor, cases and count. The name
    FID belongs to one extractor, the Inception network of Heusel et al. (arXiv:1706.08500); with any other one the
    number carries the extractor's own name.
    """

    higher_is_better: ClassVar[bool] = False

    extractor: Extractor

    def compute(self, got: Samples, base: Samples) -> Estimate:
        """Give the distance with a jackknife interval over prompts; raises InputError for unequal cases."""
        pair = paired(self.extractor, got, base)
        prompts = [case.prompt for case in got.cases]
        return left_out(frechet_distance, pair, prompts, self.extractor.name, floor=0.0)


def frechet_distance(one: Float64[Tensor, "n d"], two: Float64[Tensor, "m d"]) -> float:
    """Fréchet distance of two feature sets with sample covariances (divisor n - 1).

    With centred features A, B the eigenvalues of C1 C2 are the squared singular values of A B^T / sqrt((n-1)(m-1)), so
    tr (C1 C2)^(1/2) is a nuclear norm; the triangular factors of A and B give the same one at size d. No matrix root
    is taken, and a singular covariance (n <= d) does no harm.
    """
    a, b = one - one.mean(0), two - two.mean(0)
    n, m = len(a) - 1, len(b) - 1
    ra, rb = (torch.linalg.qr(x, mode="r").R for x in (a, b))
    cross = torch.linalg.svdvals(ra @ rb.T).sum() / (n * m) ** 0.5
    traces = a.square().sum() / n + b.square().sum() / m
    gap = (one.mean(0) - two.mean(0)).square().sum()
    return max(float(gap + traces - 2 * cross), 0.0)
