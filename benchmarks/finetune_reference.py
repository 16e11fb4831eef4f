"""One training step of four erasers in the manner of the official scripts, in our own words, for the clock alone.

That manner: a second copy of the network as the teacher; at every step a partial trajectory is walked afresh by DDIM
with classifier-free guidance, the whole batch to one drawn point; every prediction is a pass of its own; a plain Adam
moves the student when all gradients are there. ESD: github.com/rohitgandikota/erasing (the CompVis script). ANT's
script does the same. All but One and SCORE have no official code: theirs are the same losses done in this manner.
Of trajectories only one guided sampler step is taken here; how many a step needs is arithmetic (`walked`).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from expunge.ops.independence import Discriminator, confusion, telling

Loss = Callable[["Official"], Tensor]


@dataclass
class Official:
    """Student, teacher and optimizer; texts: encoded prompts "1 l d" of target, anchor, other and empty.

    trained: names of the parameters that move. masks: which of their scalars, by name; empty is all.
    """

    student: UNet2DConditionModel
    scheduler: DDIMScheduler
    texts: Mapping[str, Float[Tensor, "1 l d"]]
    batch: int
    trained: Sequence[str]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    strength: float = 1.0

    def __post_init__(self) -> None:
        self.teacher = copy.deepcopy(self.student)
        self.student.requires_grad_(False)
        own = dict(self.student.named_parameters())
        self.moved = {name: own[name].requires_grad_() for name in self.trained}
        self.optimizer = torch.optim.Adam(self.moved.values(), lr=1e-5)
        config: Any = self.student.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.judge = Discriminator(config.in_channels, config.sample_size, 1, torch.Generator().manual_seed(0))
        self.judging = torch.optim.Adam(self.judge.parameters(), lr=1e-3)
        self.scheduler.set_timesteps(50)

    def latents(self, n: int | None = None) -> Float[Tensor, "n c h w"]:
        """Stand-in latents; times do not depend on their values."""
        return torch.randn(n or self.batch, *self.shape)

    def ask(self, net: UNet2DConditionModel, x: Float[Tensor, "n c h w"], text: str) -> Float[Tensor, "n c h w"]:
        """One pass of one network under one prompt."""
        t = torch.full((len(x),), 500)
        return net(x, t, self.texts[text].expand(len(x), -1, -1), return_dict=False)[0]

    @torch.no_grad()
    def sampler_step(self) -> None:
        """One guided DDIM step of the batch, both halves of guidance in one pass, as the official samplers have it."""
        x, t = self.latents(), self.scheduler.timesteps[20]
        cond = torch.cat([self.texts[name].expand(len(x), -1, -1) for name in ("", "target")])
        u, c = self.student(torch.cat([x, x]), t, cond, return_dict=False)[0].chunk(2)
        self.scheduler.step(u + 3.0 * (c - u), t, x)

    def step(self, loss: Loss) -> None:
        """Loss, backward pass, mask, Adam."""
        self.optimizer.zero_grad()
        loss(self).backward()
        for name, mask in self.masks.items():
            grad = self.moved[name].grad
            if grad is not None:
                grad.mul_(mask)
        self.optimizer.step()


def mse(pred: Tensor, goal: Tensor) -> Tensor:
    """Mean squared error."""
    return (pred - goal).square().mean()


def esd(job: Official) -> Tensor:
    """‖s(c) − (u − η (c − u))‖²."""
    x = job.latents()
    with torch.no_grad():
        u, c = job.ask(job.teacher, x, ""), job.ask(job.teacher, x, "target")
    return mse(job.ask(job.student, x, "target"), u - job.strength * (c - u))


def all_but_one(job: Official) -> Tensor:
    """‖g_s(c) − g(a)‖² + ‖g_s(r) − g(r)‖² + ‖s("") − u‖², g against the unconditional prediction."""
    x = job.latents()
    with torch.no_grad():
        u, a, r = (job.ask(job.teacher, x, name) for name in ("", "anchor", "other"))
    su, sc, sr = (job.ask(job.student, x, name) for name in ("", "target", "other"))
    return mse(sc - su, a - u) + mse(sr - su, r - u) + mse(su, u)


def ant(job: Official) -> Tensor:
    """‖s(c) − (u ± η (c − u))‖² + λ ‖s("") − u‖²."""
    x = job.latents()
    with torch.no_grad():
        u, c = job.ask(job.teacher, x, ""), job.ask(job.teacher, x, "target")
    return mse(job.ask(job.student, x, "target"), u - job.strength * (c - u)) + 0.5 * mse(
        job.ask(job.student, x, ""), u
    )


def score(job: Official) -> Tensor:
    """Direction, what is kept, and the game against a discriminator that learns on this step's pair first."""
    late, twin, kept, early = job.latents(), job.latents(), job.latents(), job.latents(max(1, job.batch // 2))
    with torch.no_grad():
        n, c = job.ask(job.teacher, late, "anchor"), job.ask(job.teacher, late, "target")
        r, u, e = (
            job.ask(job.teacher, kept, "other"),
            job.ask(job.teacher, kept, ""),
            job.ask(job.teacher, early, "target"),
        )
        other = twin - job.ask(job.student, twin, "anchor")
    said = job.ask(job.student, late, "target")
    held = mse(job.ask(job.student, kept, "other"), r) + 0.5 * mse(job.ask(job.student, kept, ""), u)
    held = held + mse(job.ask(job.student, early, "target"), e)
    game = play(job.judge, job.judging, late - said, other)
    return 0.1 * game + held + mse(said, n - job.strength * (c - n))


def play(judge: Discriminator, judging: torch.optim.Optimizer | None, clean: Tensor, other: Tensor) -> Tensor:
    """A discriminator's passes: both samples and the slope, backward, a step of its own if it has one, the answer."""
    t, seen = torch.full((len(clean),), 0.5), clean.detach().requires_grad_()
    judge.requires_grad_(True)
    told = judge(seen, t)[:, 0]
    (slope,) = torch.autograd.grad(told.sum(), seen, create_graph=True)
    loss = telling(told, judge(other, t)[:, 0]) + 0.005 * slope.square().flatten(1).sum(1).mean()
    judge.zero_grad()
    loss.backward()
    if judging is not None:
        judging.step()
    judge.requires_grad_(False)
    return confusion(judge(clean, t)[:, 0]).mean()


LOSSES: Mapping[str, Loss] = {"esd": esd, "all_but_one": all_but_one, "ant": ant, "score": score}


def walked(method: str, walk: int) -> float:
    """Guided sampler steps of a batch that one training step needs: a stop drawn of `walk` points, (walk − 1) / 2.

    SCORE walks three times: asked, twin, retained. Its early states are given to it for nothing.
    """
    return (walk - 1) / 2 * (3 if method == "score" else 1)
