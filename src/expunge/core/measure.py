"""How results are measured: per-image detectors, set metrics, and statements about the edit itself."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.errors import InputError
from expunge.core.records import Case, Certificate, Estimate, OperatingPoint


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

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"] | None:
        """Give the vectors behind the score, on which other heads can be trained; None if there are none to give."""
        return None


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


@dataclass(frozen=True)
class Reading:
    """The layers that read one text route before and after an edit, and the embedding rows that a request is about.

    A layer W gives W k for a row k; weights as the models hold them, rows in float64.
    """

    old: tuple[Float[Tensor, "_ in"], ...]
    new: tuple[Float[Tensor, "_ in"], ...]
    targets: tuple[tuple[Float[Tensor, "_ in"], Float[Tensor, "_ in"]], ...]
    """Rows of each target prompt from its last word to the window's end, and the anchor's rows they face."""
    kept: tuple[Float[Tensor, "_ in"], ...]
    """All rows of the empty prompt and of each retained one."""


@dataclass(frozen=True)
class Edit:
    """What an erasure changed, and what was asked for; `ops.reading.edit_between` makes one."""

    request: Request
    changed: tuple[str, ...]
    """Parameters that differ from the base's; empty for guards."""
    parameters: int
    """How many the network has."""
    readings: tuple[Reading, ...]
    """One per text route; none unless all that changed are layers which read the prompt alone."""


class Certifier(ABC):
    """Computes one kind of statement about an edit, from nothing but the edit."""

    @abstractmethod
    def certify(self, edit: Edit) -> Certificate | None:
        """Give the statement; None where this kind does not apply to the edit."""
