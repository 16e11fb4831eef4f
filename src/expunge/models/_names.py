"""Which models have a name. Imports no torch, so that listing them is instant."""

from pathlib import Path

EMBEDDED = Path(__file__).parent.parent / "embedded"
"""Folders with a `model_index.json` below it are the embedded models."""

TINY = ("tiny-unet", "tiny-unet-v", "tiny-sdxl", "tiny-sd3", "tiny-flux", "tiny-flux-distilled")
"""Random toy models of real classes, built by `models/tiny.py`."""

PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
CHECKPOINTS = (".safetensors", *PICKLED)
"""Endings of one-file checkpoints; pickled ones are never read."""

SHAPES = Path(__file__).parent / "shapes"
"""One JSON file for each published model whose shape is known, without weights."""


def shape_names() -> tuple[str, ...]:
    """List the published models that `skeleton` can describe; `load` knows none of these names."""
    return tuple(sorted(file.stem for file in SHAPES.glob("*.json")))


def embedded_names(root: Path = EMBEDDED) -> tuple[str, ...]:
    """List the trained models that ship with the package."""
    return tuple(sorted(index.parent.name for index in root.glob("*/model_index.json")))


def parted(name: str) -> tuple[Path, str] | None:
    """Split "FILE.safetensors@FOLDER" into the checkpoint and what describes it; None for every other name.

    Pickled checkpoints are split too, so that they are refused for what they are.
    """
    for ending in CHECKPOINTS:
        file, at, folder = name.partition(f"{ending}@")
        if at:
            return Path(file + ending), folder
    return None


def settled(name: str) -> str:
    """Return a local model's absolute path, so that it means the same from anywhere; every other name as it is."""
    if (found := parted(name)) is not None:
        return f"{found[0].resolve()}@{settled(found[1])}"
    return name if name in model_names() or not Path(name).is_dir() else str(Path(name).resolve())


def model_names() -> tuple[str, ...]:
    """List every name `load` knows besides paths and hub ids: embedded models first, then toy ones."""
    return (*embedded_names(), *TINY)
