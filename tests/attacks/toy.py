"""A generator whose pictures show in which directions its guided prediction points: what erasing leaves is chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.attack import Aim, Attempt
from expunge.core.concept import Concept
from expunge.core.generator import Generator

BERRY = Concept(name="berry", prompts=("berry",))
AIM = Aim(concept=BERRY, prompts=("a berry on red", "a berry on blue", "one berry"), seeds=(0, 1, 2))
Meaning = Callable[[str], float]


@dataclass(frozen=True)
class WordToy:
    """v = u + w (c - u) with c, u the meanings of prompt and negative prompt; the picture is v everywhere, clipped."""

    meaning: Meaning
    name: str = "word-toy"
    family: str = "unet"
    network: nn.Module = nn.Module()  # noqa: RUF009 - never used

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance_scale: float,
        steps: int,
        negative: Sequence[str] | None = None,
    ) -> Tensor:
        rows = []
        for prompt, seed, other in zip(prompts, seeds, negative or [""] * len(prompts), strict=True):
            noise = 0.01 * torch.rand(1, generator=torch.Generator().manual_seed(seed))
            u, c = self.meaning(other), self.meaning(prompt)
            rows.append((u + guidance_scale * (c - u) + noise).clamp(0, 1).view(1, 1, 1).expand(3, 4, 4))
        return torch.stack(rows)

    def _silent(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a prompt attack asks the sampler only")

    encode = check_prompt = visit = predict = distance = sites = select = weight = _silent
    absorb = noised = as_eps = as_clean = _silent

    def view(self, **_: Any) -> "WordToy":
        return replace(self)


def shown(attempt: Attempt, scale: float = 4.0) -> list[bool]:
    """Whether each picture of an attempt is bright: the toy's way of showing a berry."""
    images = attempt.model.generate(
        attempt.prompts, seeds=attempt.seeds, guidance_scale=scale, steps=1, negative=attempt.negative
    )
    return (images.mean((1, 2, 3)) > 0.5).tolist()


def base(prompt: str) -> float:
    """Means 1 where the berry is named."""
    return float("berry" in prompt.split())


def as_toy(meaning: Meaning) -> Generator:
    return WordToy(meaning)  # type: ignore[return-value]
