"""Emoji world as training data: images on coloured backgrounds, and captions that say what is drawn."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from expunge.stages._pictures import GROUNDS as BACKGROUNDS
from expunge.stages._pictures import WORLD as DATASET


@dataclass(frozen=True)
class Caption:
    """A sentence, and which attributes of the picture it names."""

    text: str
    says_concept: bool
    says_style: bool
    says_background: bool


TEMPLATES = (
    "a {s} picture of a {c} on a {b} background",
    "{s} {c}, {b} background",
    "a {c} in {s} style on {b}",
    "a {s} picture of a {c}",
    "a {c} on a {b} background",
    "a picture of a {c}",
    "{c}",
    "a {s} picture",
    "a {s} picture on a {b} background",
)


@dataclass(frozen=True)
class World:
    """Every render, with its concept, style and split; a pair of the two is drawn by several hands."""

    rgba: Tensor  # "n 4 64 64" in [0, 1]
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    synonyms: dict[str, tuple[str, ...]]
    categories: dict[str, str]
    concept: Tensor  # "n" indices
    style: Tensor
    held_out: Tensor  # "n" bool

    @property
    def train(self) -> Tensor:
        """Indices of renders a generator may learn from."""
        return torch.nonzero(~self.held_out).flatten()

    @property
    def pairs(self) -> list[int]:
        """First render of every style × concept pair, whoever drew it."""
        first: dict[tuple[int, int], int] = {}
        for i, pair in enumerate(zip(self.style.tolist(), self.concept.tolist(), strict=True)):
            first.setdefault(pair, i)
        return list(first.values())

    def compose(self, index: Tensor, background: Tensor) -> Tensor:
        """Render `index` over `background`: "b 3 64 64" in [0, 1]."""
        rgba = self.rgba[index]
        return rgba[:, :3] * rgba[:, 3:] + palette()[background][:, :, None, None] * (1 - rgba[:, 3:])

    def caption(self, index: int, background: int, rng: torch.Generator) -> Caption:
        """Draw a caption: the plain template half the time, a synonym one time in four."""

        def roll(n: int) -> int:
            return int(torch.randint(n, (), generator=rng))

        name = self.concepts[self.concept[index]]
        if roll(4) == 0:
            name = self.synonyms[name][roll(2)]
        form = TEMPLATES[0] if roll(2) else TEMPLATES[roll(len(TEMPLATES))]
        text = form.format(s=self.styles[self.style[index]], c=name, b=list(BACKGROUNDS)[background])
        return Caption(text, "{c}" in form, "{s}" in form, "{b}" in form)


def join(ours: World, others: World) -> World:
    """Both worlds as one, ours first; what `others` holds comes under concepts of its own."""
    step = len(ours.concepts)
    return World(
        rgba=torch.cat([ours.rgba, others.rgba]),
        concepts=ours.concepts + others.concepts,
        styles=ours.styles,
        synonyms={**others.synonyms, **ours.synonyms},
        categories={**others.categories, **ours.categories},
        concept=torch.cat([ours.concept, others.concept + step]),
        style=torch.cat([ours.style, others.style]),
        held_out=torch.cat([ours.held_out, others.held_out]),
    )


def palette() -> Tensor:
    """Background colours, "k 3" in [0, 1]."""
    return torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in BACKGROUNDS.values()])


def load(path: Path = DATASET) -> World:
    """Read the packed dataset."""
    rows = pq.read_table(path).to_pylist()
    concepts = tuple(dict.fromkeys(row["name"] for row in rows))
    styles = tuple(dict.fromkeys(row["style"] for row in rows))
    pixels = [np.asarray(Image.open(io.BytesIO(row["png"])).convert("RGBA")) for row in rows]
    return World(
        rgba=torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255,
        concepts=concepts,
        styles=styles,
        synonyms={row["name"]: tuple(row["synonyms"]) for row in rows},
        categories={row["name"]: row["category"] for row in rows},
        concept=torch.tensor([concepts.index(row["name"]) for row in rows]),
        style=torch.tensor([styles.index(row["style"]) for row in rows]),
        held_out=torch.tensor([row["split"] == "held_out" for row in rows]),
    )
