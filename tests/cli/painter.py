"""A toy that detectors can read: the tiny U-Net's text encoder and weights, and pictures in the colour they mean."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.core.generator import Generator
from expunge.models.load import load

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
COLOURS = ("red", "green", "blue")
NEAR = 0.5
WORDS = ("cat", "dog", "car", "house", "sky")


class Painter:
    """Paints the colour whose value in the unedited LAYER is nearest to that of the prompt's first word.

    An edit of that layer moves what is painted, as it would in a real model; a word near no colour is painted grey.
    """

    def __init__(self, inner: Generator, known: Tensor) -> None:
        self.inner, self.known = inner, known

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def view(self, **changes: Any) -> "Painter":
        return Painter(self.inner.view(**changes), self.known)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], **_: Any) -> Tensor:
        apart = torch.cdist(first_values(self.inner, prompts), self.known) / self.known.norm(dim=1).mean()
        colour = torch.eye(3)[apart.argmin(1)] * (apart.min(1).values < NEAR)[:, None]
        grain = [0.05 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return (0.4 + 0.3 * colour[:, :, None, None] + torch.stack(grain)).clamp(0, 1)


def first_values(model: Generator, prompts: Sequence[str]) -> Tensor:
    """What LAYER reads in each prompt's first word; the text encoder is causal, so nothing behind it takes part."""
    return model.encode(prompts).tokens[:, 1] @ model.weight(LAYER).T


def painter(name: str, **_: Any) -> Generator:
    """In place of `expunge.models.load.load`."""
    base = load(name)
    with torch.no_grad():
        return Painter(base, first_values(base, COLOURS))  # type: ignore[return-value]


SUITE = """
name = "reds"
version = "1"
detectors = ["colour"]
[sampler]
steps = 2
guidance_scale = 3.0
[[target]]
name = "red"
kind = "object"
retain = ["blue"]
"""


def write_suite(folder: Path) -> Path:
    """A suite of sentences that begin with their colour."""
    folder.mkdir(parents=True)
    (folder / "suite.toml").write_text(SUITE)
    rows = ["case_id,target,role,concept,style,background,prompt,seed"]
    rows += [f"red-{i},red,target,red,,,red {word},{i}" for i, word in enumerate(WORDS)]
    rows += ["red-blue,red,retain,blue,,,blue car,5"]
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_lines(file: Path) -> Path:
    """125 sentences that begin with what is asked for."""
    file.write_text("\n".join(f"{{}} {a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS))
    return file
