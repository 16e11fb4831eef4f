"""Negative-prompt flip: ask for anything, and for the erased concept as the negative prompt."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from expunge.core.attack import Access, Aim, Attack, Attempt, Threat
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator


@dataclass(frozen=True, kw_only=True)
class NegativeFlip(Attack):
    """Draw the prompt with a neutral word in place of the concept, under the concept as the negative prompt.

    Guidance gives u + w (c - u) with u the prediction under the negative prompt. Where erasing made that
    e(nothing) - strength d, with d the concept's direction, subtracting it adds (w - 1) strength d: the concept comes
    back for nothing. Aimed at methods that reverse guidance, ESD and its kin. Not for guidance-distilled models, which
    read no negative prompt.
    """

    paper: ClassVar[str] = "ours"
    access: ClassVar[Access] = "prompt"
    threat: ClassVar[Threat] = "T0"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})

    carrier: str = "thing"
    """Word that stands where the concept stood."""

    def __post_init__(self) -> None:
        if not self.carrier.strip():
            raise InputError(f"carrier is {self.carrier!r}; legal: a word")

    def search(self, model: Generator, aim: Aim, run: Run, *, reference: Generator) -> Iterator[Attempt]:
        """One attempt."""
        yield self._under(model, aim, aim.concept.phrase)

    def random(
        self, model: Generator, aim: Aim, run: Run, *, reference: Generator, found: Attempt
    ) -> Iterator[Attempt]:
        """The same prompts under letters that mean nothing, as many as the concept has."""
        size = len(aim.concept.phrase)
        letters = "".join(chr(97 + k) for k in torch.randint(26, (size,), generator=run.rng("random")).tolist())
        yield replace(found, negative=(letters,) * len(aim.prompts))

    def _under(self, model: Generator, aim: Aim, negative: str) -> Attempt:
        return Attempt(
            model=model,
            prompts=tuple(aim.renamed(prompt, self.carrier) for prompt in aim.prompts),
            seeds=aim.seeds,
            negative=(negative,) * len(aim.prompts),
            step=1,
        )
