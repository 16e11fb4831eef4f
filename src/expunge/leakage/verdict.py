"""The only sentences a leakage certificate may end in. Free of torch.

A `Verdict` is one of the productions below or does not exist; numbers are rounded so that no sentence says more than
was measured. "LEAK ≤" needs a scope: a structure of the sampler, or one named detector. Source: certificates.md,
sections 3, 9.1 and 11.14; the detector's production is section 4's scope sentence.
"""

import re
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from expunge.core.errors import InputError

_NUMBER, _NAME, _HASH = r"(?:0|[1-9]\d*)(?:\.\d+)?", r"[\w.+-]+", r"[0-9a-f]{12}"
GRAMMAR = {
    "leak": rf"LEAK ≥ {_NUMBER} bits \(95 %\)",
    "none": rf"NO LEAK FOUND by family {_NAME}; would have detected π ≥ {_NUMBER} % \(80 % power\)",
    "structural": rf"LEAK ≤ {_NUMBER} bits for all observers, prompts {_HASH}, structural",
    "detector": rf"LEAK ≤ {_NUMBER} bits as seen by detector {_NAME} {_HASH} \(95 %\)",
    "attack": rf"ATTACK {_NAME}@{_NAME}: success ≤ {_NUMBER} % \(95 %\)",
    "invalid": r"INVALID \(control failed\)",
}


@dataclass(frozen=True)
class Verdict:
    """A sentence of the grammar; raises InputError for any other text."""

    text: str

    def __post_init__(self) -> None:
        if not any(re.fullmatch(form, self.text) for form in GRAMMAR.values()):
            raise InputError(f"{self.text!r} is no verdict; legal forms: {', '.join(GRAMMAR)}")

    @property
    def kind(self) -> str:
        """Which production it is: leak, none, structural, detector, attack or invalid."""
        return next(kind for kind, form in GRAMMAR.items() if re.fullmatch(form, self.text))


INVALID = Verdict("INVALID (control failed)")


def leak(bits: float) -> Verdict:
    """Say that at least this much is left; rounded down. Raises InputError for nothing or more than one bit."""
    if not 0 < bits <= 1:
        raise InputError(f"a coin leaks more than 0 and at most 1 bit, got {bits}")
    return Verdict(f"LEAK ≥ {_down(bits)} bits (95 %)")


def none_found(family: str, share: float) -> Verdict:
    """Say that a family of observers found nothing, and what share of leaking pictures it would have found."""
    _check_share(share)
    return Verdict(f"NO LEAK FOUND by family {family}; would have detected π ≥ {_up(100 * share)} % (80 % power)")


def structural(bits: float, prompts: str) -> Verdict:
    """Say what no observer can exceed on these prompts (by hash) because of how the sampler is built; rounded up."""
    _check_share(bits)
    return Verdict(f"LEAK ≤ {_up(bits)} bits for all observers, prompts {prompts[:12]}, structural")


def seen_by(bits: float, detector: str, digest: str) -> Verdict:
    """Say how much one detector (by name and hash) sees at most; other observers may see more. Rounded up."""
    _check_share(bits)
    return Verdict(f"LEAK ≤ {_up(bits)} bits as seen by detector {detector} {digest[:12]} (95 %)")


def attack(name: str, budget: str, success: float) -> Verdict:
    """Say how often an attack within a budget succeeds at most on a fresh prompt; rounded up."""
    _check_share(success)
    return Verdict(f"ATTACK {name}@{budget}: success ≤ {_up(100 * success)} % (95 %)")


def _check_share(value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{value} is neither a share nor bits of a coin; legal: 0 to 1")


def _down(value: float) -> str:
    return _digits(value, ROUND_FLOOR)


def _up(value: float) -> str:
    return _digits(value, ROUND_CEILING)


def _digits(value: float, rounding: str) -> str:
    """Two significant digits and no exponent."""
    exact = Decimal(value)
    if not exact:
        return "0"
    step = Decimal(1).scaleb(exact.adjusted() - 1)
    text = f"{exact.quantize(step, rounding=rounding):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
