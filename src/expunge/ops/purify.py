"""Deterministic walks between a clean picture and a noise level, up by the model as it was, down by what it became."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.errors import InputError
from expunge.core.generator import Generator, State
from expunge.ops.guidance import guide

LAST = 0.999  # the noisiest level of a schedule of 1000 timesteps


def levels(steps: int, depth: float) -> Float[Tensor, "n"]:
    """Evenly spaced levels from 0 to depth · 0.999, steps + 1 of them.

    Raises InputError for steps below 1 and for a depth that is not above 0 and at most 1.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; legal: 1 and above")
    if not 0 < depth <= 1:
        raise InputError(f"depth is {depth}; legal: above 0, at most 1")
    return torch.linspace(0, depth * LAST, steps + 1)


def mixture(model: Generator, x: Float[Tensor, "b c h w"], t: Float[Tensor, ""]) -> tuple[Tensor, Tensor]:
    """Shares (s, σ) in x = s · clean + σ · eps at a level, from the model's own conversions.

    clean = A x + B p and eps = C x + D p hold for every prediction p, so s A + σ C = 1 and s B + σ D = 0:
    s = D / (A D − B C), σ = −B / (A D − B C).
    """
    zero, one = torch.zeros_like(x[:1]), torch.ones_like(x[:1])
    level = t.reshape(1).to(x.device)
    at_x, at_zero = State(x=one, t=level), State(x=zero, t=level)
    a, b = model.as_clean(at_x, zero), model.as_clean(at_zero, one)
    c, d = model.as_eps(at_x, zero), model.as_eps(at_zero, one)
    whole = a * d - b * c
    return d / whole, -b / whole


@torch.no_grad()
def inverted(model: Generator, clean: Float[Tensor, "b c h w"], cond: Condition, steps: int, depth: float) -> Tensor:
    """Walk clean latents up to level depth · 0.999: x' = s' · clean(x) + σ' · eps(x), guidance 1 (DDIM inversion).

    Source: arXiv:2010.02502, section 4.3, the sampler's own steps backwards; in rectified flow Euler's.
    """
    grid, x = levels(steps, depth), clean
    for here, there in pairwise(grid):
        x = _step(model, x, here, there, model.predict(_state(x, here), cond))
    return x


@torch.no_grad()
def descended(
    model: Generator,
    x: Float[Tensor, "b c h w"],
    cond: Condition,
    uncond: Condition,
    *,
    guidance_scale: float,
    steps: int,
    depth: float,
) -> Float[Tensor, "b c h w"]:
    """Walk latents down from level depth · 0.999 to clean ones, guided: u + guidance_scale · (c − u)."""
    grid = levels(steps, depth).flip(0)
    for here, there in pairwise(grid):
        state = _state(x, here)
        pred = model.predict(state, cond)
        if guidance_scale != 1:
            pred = guide(model.predict(state, uncond), pred, guidance_scale)
        x = _step(model, x, here, there, pred) if there > 0 else model.as_clean(state, pred)
    return x


def _state(x: Tensor, t: Tensor) -> State:
    return State(x=x, t=t.expand(len(x)).to(x.device))


def _step(model: Generator, x: Tensor, here: Tensor, there: Tensor, pred: Tensor) -> Tensor:
    state, (s, sigma) = _state(x, here), mixture(model, x, there)
    return s * model.as_clean(state, pred) + sigma * model.as_eps(state, pred)
