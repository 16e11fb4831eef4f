"""Which scalars of a model carry a loss: gradients at the frozen weights, and the share of them that may move.

Source: SalUn (arXiv:2310.12508); the Fisher diagonal: arXiv:1612.00796.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.ops.flow import own_latents
from expunge.ops.limits import at_least
from expunge.ops.student import Learner

Saliency = Literal["gradient", "fisher"]


def denoising(
    model: Generator, clean: Float[Tensor, "b c h w"], cond: Condition, rng: torch.Generator
) -> Float[Tensor, "b"]:
    """Squared error of the native prediction against the one whose clean sample is the given one, at drawn levels.

    The clean sample is affine in the prediction, x0(p) = x0(0) + p (x0(1) − x0(0)), so the right p is
    (clean − x0(0)) / (x0(1) − x0(0)) in every parameterization.
    """
    state = model.noised(clean, rng=rng)
    zero = model.as_clean(state, torch.zeros_like(state.x))
    right = (clean - zero) / (model.as_clean(state, torch.ones_like(state.x)) - zero)
    return model.distance(model.predict(state, cond), right)


@torch.enable_grad()
def saliency(
    student: Learner, loss: Callable[[int], Float[Tensor, ""]], draws: int, kind: Saliency
) -> tuple[Float[Tensor, "..."], ...]:
    """Score every trainable scalar by its gradient over `draws` losses: |mean g| (gradient) or mean g² (fisher)."""
    sums = [torch.zeros_like(p) for p in student.parameters]
    for draw in range(draws):
        grads = torch.autograd.grad(loss(draw), student.parameters, allow_unused=True)
        for total, g in zip(sums, grads, strict=True):
            if g is not None:
                total += g if kind == "gradient" else g.square()
    return tuple((total / draws).abs() for total in sums)


@dataclass(frozen=True)
class Look:
    """How a model is asked which of its scalars draw a text: by `denoising` of its own pictures of it.

    pictures: how many it draws, at guidance 1 in `steps` sampler steps. draws: noised batches averaged over.
    """

    kind: Saliency
    _: KW_ONLY
    pictures: int
    draws: int
    steps: int

    def scores(self, student: Learner, texts: Sequence[str], run: Run) -> tuple[Float[Tensor, "..."], ...]:
        """Score the student's scalars where it stands, the texts taking turns over the pictures."""
        at_least(self, {"pictures": 1, "draws": 1})
        told = [texts[i % len(texts)] for i in range(self.pictures)]
        clean, cond = own_latents(student.model, told, run, steps=self.steps), student.model.encode(told)

        def loss(draw: int) -> Tensor:
            i = torch.randint(self.pictures, (min(4, self.pictures),), generator=run.rng("salient", draw))
            return denoising(student.view(), clean[i], cond.take(i), run.rng("saliency", draw)).mean()

        return saliency(student, loss, self.draws, self.kind)


def most_salient(scores: Sequence[Float[Tensor, "..."]], share: float) -> tuple[Bool[Tensor, "..."], ...]:
    """Masks of the round(share · N) largest of all N scores together; of equal ones the first.

    Raises InputError for a share outside (0, 1] or one that keeps nothing.
    """
    flat = torch.cat([score.flatten() for score in scores])
    keep = round(share * len(flat))
    if not 0 < share <= 1 or keep == 0:
        raise InputError(f"share is {share}; legal: above 0, to 1, and enough to keep one of {len(flat)} scalars")
    # the k-th largest, then ties in order: a full sort of a whole network would need gigabytes
    edge = flat.kthvalue(len(flat) - keep + 1).values
    kept = flat > edge
    ties = (flat == edge).nonzero()[: keep - int(kept.sum()), 0]
    kept[ties] = True
    sizes = [score.numel() for score in scores]
    return tuple(part.view_as(score) for part, score in zip(kept.split(sizes), scores, strict=True))


def common(masks: Iterable[Sequence[Bool[Tensor, "..."]]]) -> tuple[Bool[Tensor, "..."], ...]:
    """Mark what every one of several masks marks; raises InputError if that is nothing. Source: ANT, M*."""
    first, *rest = masks
    found = list(first)
    for other in rest:
        found = [mine & theirs for mine, theirs in zip(found, other, strict=True)]
    if not any(bool(mask.any()) for mask in found):
        raise InputError(f"{len(rest) + 1} saliency maps have no scalar in common; lower their number or raise share")
    return tuple(found)
