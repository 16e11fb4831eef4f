"""Bounds on settings, refused in one line."""

from collections.abc import Mapping

from expunge.core.errors import InputError


def at_least(settings: object, least: Mapping[str, float]) -> None:
    """Raise InputError if a named attribute is below its least legal value, or no number."""
    for name, value in least.items():
        if not getattr(settings, name) >= value:
            raise InputError(f"{name} is {getattr(settings, name)}; legal: {value} or more")
