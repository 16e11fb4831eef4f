"""A model's own pictures of something, with what each shows and where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.ops.levels import Level, noised_at
from expunge.ops.listening import heat, listen, region
from expunge.ops.wording import Shown, Wording

CHUNK = 8  # pictures drawn together: bounds memory, changes no result's law
LOOKS = 4  # noisings over which a picture's heat is averaged
LEGAL = "legal: attention, whole, or package.module:name of a callable from picture and phrase to mask"

Segmenter = Callable[[Float[Tensor, "1 3 h w"], str], Bool[Tensor, "1 h w"]]
"""Where a picture shows a phrase: a mask of the picture's size."""


def segmenter(name: str) -> Segmenter:
    """Import the callable that `package.module:name` says; raises InputError if there is none."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"masks is {name!r}, which cannot be imported ({error}); {LEGAL}") from None
    if not callable(found):
        raise InputError(f"masks is {name!r}, a {type(found).__name__}; {LEGAL}")
    return cast(Segmenter, found)


@dataclass(frozen=True)
class Scenes:
    """Pictures in [0, 1], their clean latents, and the encoded sentences they were drawn from."""

    images: Float[Tensor, "b 3 h w"]
    clean: Float[Tensor, "b c h2 w2"]
    lines: tuple[Wording, ...]
    shown: Shown

    @classmethod
    @torch.no_grad()
    def drawn(
        cls, model: Generator, lines: Sequence[Wording], run: Run, *, guidance_scale: float, steps: int
    ) -> "Scenes":
        """Draw one picture per sentence, on the run's stream "pictures"."""
        texts = [line.text for line in lines]
        seeds = torch.randint(2**31, (len(texts),), generator=run.rng("pictures")).tolist()
        found = []
        for start in range(0, len(texts), CHUNK):
            run.progress("drawing", start, len(texts))
            part = slice(start, start + CHUNK)
            found.append(model.generate(texts[part], seeds=seeds[part], guidance_scale=guidance_scale, steps=steps))
        run.progress("drawing", len(texts), len(texts))
        images = torch.cat(found)
        return cls(images, model.absorb(images), tuple(lines), Shown.of(model, lines, (1.0,)))

    @property
    def cond(self) -> Condition:
        """The encoded sentences."""
        return self.shown.cond

    @property
    def columns(self) -> Bool[Tensor, "b l"]:
        """Positions of each sentence's phrase."""
        return self.shown.columns

    def masks(self, model: Generator, how: str, threshold: float, level: Level, run: Run) -> Bool[Tensor, "b h w"]:
        """Where each picture shows its phrase: by the model's attention, anywhere (whole), or by a `segmenter`.

        A segmenter's masks keep the picture's size, others have the latent's. Raises InputError for a segmenter that
        cannot be imported, and for a threshold outside [0, 1).
        """
        if how == "attention":
            return self.attended(model, threshold, run.rng("masks"), level)
        if how == "whole":
            return torch.ones_like(self.clean[:, 0], dtype=torch.bool)
        where, pairs = segmenter(how), zip(self.images, self.lines, strict=True)
        return torch.cat([where(image[None], line.phrase).bool() for image, line in pairs])

    @torch.no_grad()
    def attended(
        self, model: Generator, threshold: float, rng: torch.Generator, level: Level
    ) -> Bool[Tensor, "b h2 w2"]:
        """Masks of where a model attends to each sentence's phrase: `region` of its mean `heat` at a few noisings."""
        if not 0 <= threshold < 1:
            raise InputError(f"threshold is {threshold}; legal: 0 to below 1")
        states = [noised_at(model, self.clean, rng, level) for _ in range(LOOKS)]
        sides = self.clean.shape[2:]
        warm = [heat(listen(model, state, self.cond), self.columns, *sides) for state in states]
        return region(torch.stack(warm).mean(0), threshold)
