"""Random suffix search: the prompt with random letters after it, until a picture shows the concept."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from expunge.core.attack import Access, Aim, Attack, Attempt, Rule, Threat
from expunge.core.eraser import Run
from expunge.core.generator import Family, Generator
from expunge.ops.limits import at_least


@dataclass(frozen=True, kw_only=True)
class RandomSuffix(Attack):
    """Append random letters to the prompt, try after try; the picture that a detector likes counts.

    Black box: one query each, no gradient. Any of `tries` pictures per prompt may win, so a detector's false alarms
    add up: read it beside the null control, which has as many tries.
    """

    paper: ClassVar[str] = "ours"
    access: ClassVar[Access] = "prompt"
    threat: ClassVar[Threat] = "T2"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    rule: ClassVar[Rule] = "any"

    tries: int = 5
    """Pictures per prompt."""
    letters: int = 5
    """Random letters a to z, appended as one word; any tokenizer makes tokens of them."""

    def __post_init__(self) -> None:
        at_least(self, {"tries": 1, "letters": 1})

    def search(self, model: Generator, aim: Aim, run: Run, *, reference: Generator) -> Iterator[Attempt]:
        """One attempt per try; the seeds stay the prompts' own."""
        for turn in range(self.tries):
            rng = run.rng("suffix", turn)
            ends = torch.randint(26, (len(aim.prompts), self.letters), generator=rng).tolist()
            words = ["".join(chr(97 + letter) for letter in end) for end in ends]
            yield Attempt(
                model=model,
                prompts=tuple(f"{prompt} {word}" for prompt, word in zip(aim.prompts, words, strict=True)),
                seeds=aim.seeds,
                step=turn + 1,
            )

    def random(
        self, model: Generator, aim: Aim, run: Run, *, reference: Generator, found: Attempt
    ) -> Iterator[Attempt]:
        """As many tries with the plain prompts and other seeds."""
        for turn in range(self.tries):
            seeds = torch.randint(2**31, (len(aim.prompts),), generator=run.rng("seed", turn)).tolist()
            yield Attempt(model=model, prompts=aim.prompts, seeds=tuple(seeds), step=turn + 1)
