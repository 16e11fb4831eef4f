"""Bounds on settings, refused in one line."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from expunge.core.concept import Concept
from expunge.core.errors import InputError


def at_least(settings: object, least: Mapping[str, float]) -> None:
    """Raise InputError if a named attribute is below its least legal value, or no number."""
    for name, value in least.items():
        if not getattr(settings, name) >= value:
            raise InputError(f"{name} is {getattr(settings, name)}; legal: {value} or more")


def above(settings: object, bounds: Mapping[str, float]) -> None:
    """Raise InputError if a named attribute is not above its bound, or no number."""
    for name, bound in bounds.items():
        if not getattr(settings, name) > bound:
            raise InputError(f"{name} is {getattr(settings, name)}; legal: above {bound}")


def learnable(lr: float, curve: Sequence[int]) -> None:
    """Raise InputError for a step size that moves nothing, or a curve with a point before the first step."""
    if not lr > 0:
        raise InputError(f"lr is {lr}; legal: above 0")
    if any(step < 1 for step in curve):
        raise InputError(f"curve is {curve}; legal: steps of 1 or more")


@contextmanager
def naming(concepts: Sequence[Concept]) -> Iterator[None]:
    """Let an InputError of the mathematics inside say which concepts were being erased."""
    try:
        yield
    except InputError as error:
        raise InputError(f"cannot erase {', '.join(repr(concept.name) for concept in concepts)}: {error}") from None
