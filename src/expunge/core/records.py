"""What was measured, as rows: cases, scores, estimates, summaries. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from expunge.core.errors import InputError

Role = Literal["target", "synonym", "retain"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt with one seed, and what a detector is asked about its image."""

    case_id: str
    target: str
    """Name of the erased concept this case belongs to."""
    role: Role
    concept: str
    """Name the detector is asked about: the target, or the retained neighbour itself."""
    style: str
    background: str
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """One detector's number for one image."""

    case_id: str
    arm: str
    """"base" or the name of the erased model."""
    detector: str
    concept: str
    value: float
    fired: bool
    """Whether `value` reached the detector's threshold."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval, and how it was obtained.

    Raises InputError unless low <= value <= high and 0 < level < 1.
    """

    value: float
    low: float
    high: float
    level: float
    """Confidence level of the interval, e.g. 0.95."""
    n: int
    """Observations behind the value."""
    clusters: int
    """Independent units among them: distinct prompts."""
    how: str
    """Name of the interval's construction."""
    detector: str | None = None
    corrected_for: str | None = None
    """Detector whose errors were removed; None if raw."""

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise InputError(f"estimate {self.value} lies outside its interval [{self.low}, {self.high}]")
        if not 0 < self.level < 1:
            raise InputError(f"confidence level {self.level} is not between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Where a detector decides, and how often it is right there.

    It fires when score >= threshold; sensitivity = P(fires | concept shown), specificity = P(silent | not shown).
    """

    threshold: float
    sensitivity: Estimate
    specificity: Estimate
    n: int
    """Images behind the two rates together."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The rates of one model under one detector."""

    name: str
    """"base" or the name of the erased model."""
    detector: str
    rates: Mapping[str, Estimate]
    """Corrected for the detector where it has an operating point."""
    raw: Mapping[str, Estimate]
    """The same rates as counted."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All arms of one suite in one run; the base model's row always stands among them."""

    suite: str
    suite_sha256: str
    targets: tuple[str, ...]
    arms: tuple[Arm, ...]

    def __post_init__(self) -> None:
        if not any(arm.name == "base" for arm in self.arms):
            raise InputError(f"summary of {self.suite!r} has no row named 'base'")


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A statement about an edit that anyone can compute again from the base, the patch and the request."""

    name: str
    """File of the certifier: locality, residual, drift, subspace, inversion, conditioning."""
    statement: str
    """One sentence with the figure in it."""
    value: float
    """The figure, unrounded."""
    assumptions: tuple[str, ...]
    """What the sentence is about, and what it is not."""
