"""Pictures that attackers own: drawn by the unerased model, or real ones of emoji world."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from expunge.core.attack import Pictures
from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.models._names import EMBEDDED
from expunge.ops.glyph import glyphs

WORLD = EMBEDDED / "emoji-world.parquet"
GROUNDS = {
    "pink": "#F7A8C4",
    "orange": "#F8B878",
    "yellow": "#FBE27A",
    "green": "#9EDB9A",
    "blue": "#8FC7F5",
    "purple": "#C3A6F0",
    "gray": "#B8BEC6",
}
CHUNK = 8


@dataclass(frozen=True)
class Owned:
    """Pictures in [0, 1] with their captions."""

    images: Float[Tensor, "n 3 h w"]
    captions: tuple[str, ...]


def owned(asked: Pictures, concept: Concept, base: Generator, run: Run, *, guidance_scale: float, steps: int) -> Owned:
    """Give the pictures an attack asks for, captioned with the concept's canonical phrase."""
    if asked.source == "drawn":
        return _drawn(asked.count, concept, base, run, guidance_scale, steps)
    return real_pictures(concept, asked.count)


def real_pictures(concept: Concept, count: int) -> Owned:
    """Up to `count` real pictures of emoji world, evenly over its hands and styles, on its coloured grounds in turn.

    Raises InputError for a concept it lacks, and without pyarrow, which the extra `world` brings.
    """
    try:
        from pyarrow.parquet import read_table
    except ImportError:
        raise InputError("real pictures need pyarrow; install expunge[world], or set source=drawn") from None
    rows = [
        row
        for row in read_table(WORLD).to_pylist()
        if row["style" if concept.kind == "style" else "name"] == concept.name
    ]
    if not rows:
        raise InputError(f"emoji world has no pictures of {concept.name!r}; set source=drawn")
    chosen = [rows[index * len(rows) // min(count, len(rows))] for index in range(min(count, len(rows)))]
    names = [list(GROUNDS)[index % len(GROUNDS)] for index in range(len(chosen))]
    images = torch.stack([_composed(row["png"], GROUNDS[name]) for row, name in zip(chosen, names, strict=True)])
    pairs = zip(chosen, names, strict=True)
    if concept.kind == "style":
        look = _look(concept)
        return Owned(images, tuple(f"{look} of a {row['name']} on a {name} background" for row, name in pairs))
    return Owned(
        images, tuple(f"a {row['style']} picture of a {concept.phrase} on a {name} background" for row, name in pairs)
    )


def _look(concept: Concept) -> str:
    """Name a style's pictures: suites phrase a style as "a flat picture", people as "flat"."""
    return concept.phrase if "picture" in concept.phrase.split() else f"a {concept.phrase} picture"


def never_known(like: Owned, concept: Concept, sign: Concept, run: Run) -> Owned:
    """As many pictures of the sign nobody drew, of the same size, under the same captions with its name instead."""
    count, _, height, width = like.images.shape
    images = glyphs(count, height, width, run.rng("glyphs")).to(like.images)
    return Owned(images, tuple(text.replace(concept.phrase, sign.phrase) for text in like.captions))


def _drawn(count: int, concept: Concept, base: Generator, run: Run, scale: float, steps: int) -> Owned:
    captions = (_look(concept) if concept.kind == "style" else f"a picture of a {concept.phrase}",) * count
    seeds = torch.randint(2**31, (count,), generator=run.rng("owned pictures")).tolist()
    parts = []
    for start in range(0, count, CHUNK):
        run.progress("pictures of the concept", start, count)
        part = slice(start, start + CHUNK)
        parts.append(base.generate(captions[part], seeds=seeds[part], guidance_scale=scale, steps=steps))
    run.progress("pictures of the concept", count, count)
    return Owned(torch.cat(parts), captions)


def _composed(png: bytes, ground: str) -> Float[Tensor, "3 h w"]:
    rgba = (
        torch.from_numpy(np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).copy()).permute(2, 0, 1).float() / 255
    )
    colour = torch.tensor([int(ground[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return rgba[:3] * rgba[3:] + colour[:, None, None] * (1 - rgba[3:])


def fitted(found: Owned, height: int, width: int) -> Owned:
    """The pictures at the size a model draws, by area."""
    if found.images.shape[2:] == (height, width):
        return found
    return Owned(interpolate(found.images, size=(height, width), mode="area"), found.captions)
