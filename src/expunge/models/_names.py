"""Which models have a name. Imports no torch, so that listing them is instant."""

from pathlib import Path

EMBEDDED = Path(__file__).parent.parent / "embedded"
"""Folders with a `model_index.json` below it are the embedded models."""

TINY = ("tiny-unet", "tiny-unet-v", "tiny-sdxl")
"""Random toy models of real classes, built by `models/tiny.py`."""


def embedded_names(root: Path = EMBEDDED) -> tuple[str, ...]:
    """List the trained models that ship with the package."""
    return tuple(sorted(index.parent.name for index in root.glob("*/model_index.json")))


def model_names() -> tuple[str, ...]:
    """List every name `load` knows besides paths and hub ids: embedded models first, then toy ones."""
    return (*embedded_names(), *TINY)
