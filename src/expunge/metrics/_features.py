"""What set metrics share: named extractors, and an interval that leaves out one prompt at a time."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64
from scipy.stats import norm
from torch import Tensor

from expunge.core.errors import InputError
from expunge.core.measure import Samples
from expunge.core.records import Estimate

LEVEL = 0.95
CHUNK = 64
Pair = tuple[Float64[Tensor, "n d"], Float64[Tensor, "n d"]]


@runtime_checkable
class Extractor(Protocol):
    """Turns images into feature vectors, and has a name that every number printed from them carries."""

    name: str

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Describe images in [0, 1]; resizing and normalization are part of the extractor."""
        ...


def paired(extractor: Extractor, got: Samples, base: Samples) -> Pair:
    """Extract features of both arms in float64.

    Raises InputError unless both arms answer the same cases in the same order: a distance between sets of unequal size
    or of other prompts is not comparable with any other.
    """
    if [case.case_id for case in got.cases] != [case.case_id for case in base.cases]:
        raise InputError(f"arms answer different cases ({len(got.cases)} and {len(base.cases)}); compare equal ones")
    if len({case.prompt for case in got.cases}) < 3:
        raise InputError(f"a set metric needs at least 3 distinct prompts, got {len(got.cases)} images of fewer")
    with torch.no_grad():
        return _extract(extractor, got.images), _extract(extractor, base.images)


def left_out(
    distance: Callable[[Float64[Tensor, "n d"], Float64[Tensor, "m d"]], float],
    pair: Pair,
    prompts: list[str],
    extractor: str,
    *,
    floor: float | None,
) -> Estimate:
    """Give a set distance with its delete-one-prompt jackknife interval.

    value +- z sqrt((g - 1) / g sum_i (d_i - mean d)^2), d_i the distance without prompt i of g. It measures spread over
    prompts, not the bias of a finite sample. floor: smallest value the distance can take, where it has one.
    """
    names = list(dict.fromkeys(prompts))
    value = distance(*pair)
    rest = [distance(pair[0][keep], pair[1][keep]) for keep in (_without(prompts, name) for name in names)]
    mean = sum(rest) / len(rest)
    spread = ((len(rest) - 1) / len(rest) * sum((one - mean) ** 2 for one in rest)) ** 0.5
    half = float(norm.ppf((1 + LEVEL) / 2)) * spread
    low = value - half if floor is None else min(max(value - half, floor), value)
    return Estimate(
        value=value,
        low=low,
        high=value + half,
        level=LEVEL,
        n=len(prompts),
        clusters=len(names),
        how="delete-one-prompt jackknife, normal",
        detector=extractor,
    )


def _without(prompts: list[str], name: str) -> Bool[Tensor, "n"]:
    return torch.tensor([prompt != name for prompt in prompts])


def _extract(extractor: Extractor, images: Float[Tensor, "b 3 h w"]) -> Float64[Tensor, "b d"]:
    return torch.cat([extractor.features(part).double().cpu() for part in images.split(CHUNK)])
