"""Pictures as data addresses: the page asks nobody for anything."""

import base64
import io
from pathlib import Path

from PIL import Image

WIDEST = 256
"""Larger pictures are scaled down to this many pixels; the originals stay in the run folder."""


def data_address(path: Path) -> str:
    """Return a picture as a `data:` address: PNG as it is where small, else scaled and WebP."""
    with Image.open(path) as image:
        if image.format == "PNG" and max(image.size) <= WIDEST:
            return _address("image/png", path.read_bytes())
        small = image.convert("RGB")
    small.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=88)
    return _address("image/webp", stream.getvalue())


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
