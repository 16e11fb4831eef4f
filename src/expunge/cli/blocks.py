"""Pictures in a terminal: one character holds two pixels, one above the other."""

from pathlib import Path

import numpy as np
from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text


def blocks(file: Path, *, width: int) -> Text:
    """Draw an image file `width` characters wide, in its own proportions."""
    with Image.open(file) as image:
        lines = max(1, round(image.height * width / image.width / 2))
        pixels = np.asarray(image.convert("RGB").resize((width, 2 * lines))).tolist()
    text = Text()
    for y in range(0, 2 * lines, 2):
        for x in range(width):
            over, under = pixels[y][x], pixels[y + 1][x]
            text.append("▀", Style(color=Color.from_rgb(*over), bgcolor=Color.from_rgb(*under)))
        text.append("\n")
    return text
