"""The ordinary training loss of a denoiser on pictures, in its own kind of prediction."""

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.generator import Generator, State


@torch.no_grad()
def noised_goal(
    model: Generator, clean: Float[Tensor, "b c h w"], run: Run, name: tuple[str | int, ...]
) -> tuple[State, Float[Tensor, "b c h w"]]:
    """Noise clean latents on a named random stream, and give what a perfect model would predict there.

    x = s clean + σ eps. The same stream on a zero latent gives σ eps alone, so s and with it everything else follows
    from the generator's verbs: diffusion has σ² = 1 − s², flow has σ = t. Goals: eps, v = s eps − σ clean, or
    eps − clean.
    """
    state = model.noised(clean, rng=run.rng(*name))
    noise = model.noised(torch.zeros_like(clean), rng=run.rng(*name)).x
    assert state.t is not None
    if model.family == "mmdit":
        return state, (state.x - clean) / state.t.to(clean)[:, None, None, None]
    shape = (-1, *[1] * (clean.ndim - 1))
    s = (((state.x - noise) * clean).flatten(1).sum(1) / clean.square().flatten(1).sum(1)).clamp(0, 1).view(shape)
    sigma = (1 - s.square()).sqrt()
    eps = noise / sigma
    predicts_eps = not bool(model.as_eps(state, torch.zeros_like(clean)).any())
    return state, eps if predicts_eps else s * eps - sigma * clean


def denoising_loss(
    model: Generator, clean: Float[Tensor, "b c h w"], cond: Condition, run: Run, name: tuple[str | int, ...]
) -> Float[Tensor, "b"]:
    """Squared error of the prediction at drawn noise levels; the stream `name` draws them and the noise."""
    state, goal = noised_goal(model, clean, run, name)
    return model.distance(model.predict(state, cond), goal)


def drawn_batch(count: int, size: int, run: Run, name: tuple[str | int, ...]) -> Tensor:
    """Pick `size` of `count` pictures, each at most once where there are enough."""
    order = torch.cat([torch.randperm(count, generator=run.rng(*name, turn)) for turn in range(-(-size // count))])
    return order[:size]
