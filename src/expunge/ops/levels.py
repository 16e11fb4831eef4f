"""Noise levels to train at: clean pictures noised to levels of a wanted density."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.generator import Generator, State
from expunge.ops.rows import pick_state

Level = Literal["middle", "uniform"]

CANDIDATES = 32  # uniform draws of which a level is chosen; the more, the nearer to the density


def plateau(t: Float[Tensor, "n"], low: float = 0.2, high: float = 0.4, slope: float = 50.0) -> Float[Tensor, "n"]:
    """Density over noise levels that is high between two of them, to be normalised over the levels at hand.

    f(t) = σ(slope · (t − low)) − σ(slope · (t − high)), symmetric about and largest at (low + high) / 2.
    Source: MACE (arXiv:2403.06135): timesteps 200 and 400 of 1000, slope 0.05 a timestep.
    """
    return torch.sigmoid(slope * (t - low)) - torch.sigmoid(slope * (t - high))


def noised_at(model: Generator, clean: Float[Tensor, "b c h w"], rng: torch.Generator, level: Level) -> State:
    """Noise each picture to a level drawn by `plateau`, or uniformly.

    Of 32 uniform noisings of each one is kept, with chance ∝ f(t): generators offer no other draw.
    """
    if level == "uniform":
        return model.noised(clean, rng=rng)
    drawn = model.noised(clean.repeat_interleave(CANDIDATES, 0), rng=rng)
    assert drawn.t is not None
    chance = plateau(drawn.t.double().cpu()).clamp(min=1e-30).unflatten(0, (len(clean), CANDIDATES))
    chosen = torch.multinomial(chance, 1, generator=rng)[:, 0]
    return pick_state(drawn, (torch.arange(len(clean)) * CANDIDATES + chosen).to(drawn.x.device))
