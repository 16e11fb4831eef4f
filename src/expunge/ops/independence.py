"""The adversarial independence game: a discriminator that guesses from a clean sample whether a concept was asked for.

Let C be one of two equally likely labels, natural logarithms, p1 and p0 the laws of X under each.

    min_D L(D) = H(C | X) = ln 2 − I(C; X),    L(D) = −½ E_1 log D(X) − ½ E_0 log(1 − D(X)),

so ln 2 − L(D) of any D is a lower bound on the information, in nats; it is an upper bound of nothing. The generator
plays D's certainty down to D = ½, where p1 = p0. Sources: arXiv:1406.2661 for the value of the game; the game on a
concept is our reading of SCORE (arXiv:2509.12024) and FADE (arXiv:2507.12283), whose full texts were not available.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu, softplus

from expunge.ops.descent import Average, alone

Form = Literal["confusion", "flipped"]


def telling(asked: Float[Tensor, "n"], twin: Float[Tensor, "m"]) -> Float[Tensor, ""]:
    """Balanced cross-entropy of a discriminator in nats, −½ E log D(asked) − ½ E log(1 − D(twin)), D = σ(logit)."""
    return 0.5 * (softplus(-asked).mean() + softplus(twin).mean())


def confusion(logit: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Cross-entropy of D = σ(logit) with a fair coin, −½ log D − ½ log(1 − D).

    ln 2 and stationary at D = ½ alone, strictly convex in the logit; swapping the labels changes nothing.
    """
    return -0.5 * (logsigmoid(logit) + logsigmoid(-logit))


def flipped(logit: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """−log(1 − D): the sample shall pass for its twin. Not stationary at D = ½: its slope is D everywhere."""
    return softplus(logit)


def information(loss: float) -> float:
    """What a discriminator's balanced cross-entropy proves of I(C; X) from below, in nats: max(0, ln 2 − loss)."""
    return max(0.0, math.log(2) - loss)


class Discriminator(nn.Module):
    """One trunk over clean latents and their noise level, one logit per concept.

    Strided convolutions with group norm, each scaled and shifted by the level t, then a mean over the picture; layers
    halve the side until it is 2 or less, at most four times. Weights come from `rng` alone.
    """

    bands: Tensor

    def __init__(self, channels: int, side: int, concepts: int, rng: torch.Generator, width: int = 32) -> None:
        super().__init__()
        depth = max(1, min(4, int(math.log2(max(side, 2))) - 1))
        widths = [channels, *(width * min(2**i, 4) for i in range(depth))]
        pairs = list(pairwise(widths))
        with torch.device("meta"):  # layers would draw first weights from torch's global stream
            self.blocks = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
            self.norms = nn.ModuleList(nn.GroupNorm(8, b, affine=False) for _, b in pairs)
            self.levels = nn.ModuleList(nn.Linear(16, 2 * b) for _, b in pairs)
            self.heads = nn.Linear(widths[-1], concepts)
        self.to_empty(device=rng.device)
        self.register_buffer("bands", 2.0 ** torch.arange(8) * math.pi / 2, persistent=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=rng) / p[0].numel() ** 0.5 if p.ndim > 1 else torch.zeros(()))

    def forward(self, clean: Float[Tensor, "b c h w"], t: Float[Tensor, "b"]) -> Float[Tensor, "b k"]:
        """Logits of "this concept was asked for"."""
        angle = t.float()[:, None] * self.bands
        level, x = torch.cat([angle.sin(), angle.cos()], 1), clean.float()
        for block, norm, film in zip(self.blocks, self.norms, self.levels, strict=True):
            scale, shift = film(level)[:, :, None, None].chunk(2, 1)
            x = silu(norm(block(x)) * (1 + scale) + shift)
        return self.heads(x.mean((2, 3)))


class Opponent:
    """A discriminator that learns from samples it is shown, and is held still while the generator plays."""

    def __init__(self, net: Discriminator, *, lr: float, r1: float, average: Average = alone) -> None:
        """lr: Adam's step size. r1: weight γ of ½ γ E ‖∇_x logit‖² at the samples asked for."""
        self.net, self.r1, self._average = net, r1, average
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.99))
        for p in net.parameters():  # torch would make them at the first step, too late for `state`
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.tensor(0.0), **moments}

    @property
    def state(self) -> list[Tensor]:
        """All that changes from step to step, in place: weights and moments."""
        return [*self.net.parameters(), *(m for p in self.net.parameters() for m in self.optimizer.state[p].values())]

    @torch.enable_grad()
    def learn(
        self,
        asked: Float[Tensor, "n c h w"],
        twin: Float[Tensor, "n c h w"],
        t: Float[Tensor, "n"],
        head: Int[Tensor, "n"],
    ) -> float:
        """Take one step on pairs of clean samples at levels t, pair i about concept head[i]; gives L(D) before it."""
        asked, twin = asked.detach().float().requires_grad_(self.r1 > 0), twin.detach().float()
        self.net.requires_grad_(True)
        seen = self._own(asked, t, head)
        loss = telling(seen, self._own(twin, t, head))
        total = loss
        if self.r1 > 0:
            (slope,) = torch.autograd.grad(seen.sum(), asked, create_graph=True)
            total = loss + 0.5 * self.r1 * slope.square().flatten(1).sum(1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self._average([p.grad for p in self.net.parameters() if p.grad is not None])
        self.optimizer.step()
        self.net.requires_grad_(False)
        return loss.item()

    def logit(
        self, clean: Float[Tensor, "n c h w"], t: Float[Tensor, "n"], head: Int[Tensor, "n"]
    ) -> Float[Tensor, "n"]:
        """What it makes of samples, differentiable in them and not in its own weights."""
        self.net.requires_grad_(False)
        return self._own(clean, t, head)

    def _own(self, clean: Tensor, t: Tensor, head: Tensor) -> Tensor:
        return self.net(clean, t).gather(1, head[:, None])[:, 0]
