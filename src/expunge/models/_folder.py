"""Reading files of a model folder: whatever is wrong with one is a line that names it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from expunge.core.errors import InputError


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raises InputError if there is none."""
    if not file.is_file():
        raise InputError(f"model folder {str(file.parent)!r} has no {file.name}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"file {str(file)!r} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"file {str(file)!r} does not hold a JSON object")
    return content


def weight_files(place: Path) -> tuple[str | None, list[Path]] | None:
    """Find the safetensors of a component's folder and name their variant; None if there are none."""
    stem = weight_stem(place)
    for variant in (None, "fp16"):
        tail = f".{variant}" if variant else ""
        single, index = place / f"{stem}{tail}.safetensors", place / f"{stem}.safetensors.index{tail}.json"
        if single.is_file():
            return variant, [single]
        if index.is_file():
            return variant, [place / shard for shard in sorted(set(read_json(index)["weight_map"].values()))]
    return None


def weight_variant(place: Path) -> str | None:
    """Check that every weight file of a component is whole, and name their variant."""
    found = weight_files(place)
    if found is None:
        pickled = " (pickled weights are not read)" if list(place.glob("*.bin")) else ""
        raise InputError(
            f"part {place.name!r} of {str(place.parent)!r} has no {weight_stem(place)}.safetensors{pickled}"
        )
    for file in found[1]:
        check_whole(file)
    return found[0]


def weight_stem(place: Path) -> str:
    """Name a component's weight files begin with: transformers' or diffusers'."""
    return "model" if place.name.startswith("text_encoder") else "diffusion_pytorch_model"


def check_unquantised(folder: Path, parts: Iterable[str]) -> None:
    """Raise InputError for a folder whose configuration says that a part is quantised, by whatever library.

    Such weights cannot be trained, and neither a closed form nor an export can change them exactly.
    """
    for part in parts:
        file = folder / part / "config.json"
        how = read_json(file).get("quantization_config") if file.is_file() else None
        if how is not None:
            method = how.get("quant_method", "unnamed") if isinstance(how, dict) else how
            raise InputError(
                f"model folder {str(folder)!r} is quantised in part {part!r} (method {method!r}); legal: a folder of "
                "float32, float16 or bfloat16 weights"
            )


def check_whole(file: Path) -> None:
    """Raise InputError for a weight file that is missing, truncated or damaged."""
    if not file.is_file():
        raise InputError(f"weight file {str(file)!r} is missing")
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise InputError(f"weight file {str(file)!r} is truncated or damaged: {one_line(error)}") from error


def file_header(file: Path) -> dict[str, str]:
    """Read what a weight file says about itself."""
    check_whole(file)
    with safe_open(file, "pt") as stream:
        return stream.metadata() or {}


def one_line(error: Exception) -> str:
    """Give the first line of an error that says anything."""
    return next((line.strip()[:240] for line in str(error).splitlines() if line.strip()), type(error).__name__)
