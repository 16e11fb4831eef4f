"""How results are measured: per-image detectors and set metrics."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from expunge.core.concept import Concept
from expunge.core.errors import InputError
from expunge.core.records import Case, Estimate, OperatingPoint


class Detector(ABC):
    """Says per image how strongly a concept is shown."""

    @abstractmethod
    def score(self, images: Float[Tensor, "b 3 h w"], concept: Concept) -> Float[Tensor, "b"]:
        """Score images in [0, 1]; higher = more of the concept. A concept it does not know raises InputError."""

    @abstractmethod
    def operating_point(self, concept: Concept) -> OperatingPoint | None:
        """Give the calibrated decision for a concept; None = uncalibrated, and the report says so."""

    def fires(self, images: Float[Tensor, "b 3 h w"], concept: Concept) -> Bool[Tensor, "b"]:
        """Decide: score >= the operating point's threshold, 0 if uncalibrated."""
        point = self.operating_point(concept)
        return self.score(images, concept) >= (point.threshold if point is not None else 0.0)


@dataclass(frozen=True)
class Samples:
    """Images of one arm with the cases they answer, row by row."""

    images: Float[Tensor, "b 3 h w"]
    cases: tuple[Case, ...]

    def __post_init__(self) -> None:
        if len(self.cases) != self.images.shape[0]:
            raise InputError(f"got {self.images.shape[0]} images for {len(self.cases)} cases")


class Metric(ABC):
    """Compares a set of images with the base model's on the same cases."""

    higher_is_better: ClassVar[bool]

    @abstractmethod
    def compute(self, got: Samples, base: Samples) -> Estimate:
        """Give the metric with its interval."""
