"""Sentences about a target and the same ones about its anchor and other words, and what a teacher says to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.condition import Condition
from expunge.core.errors import InputError
from expunge.core.generator import Generator, State
from expunge.ops.rows import at_scales
from expunge.ops.tap import attended, feature
from expunge.ops.trajectory import Goals, Walk, predict_each
from expunge.ops.wording import Shown, Wording, wordings


@dataclass(frozen=True)
class Asked:
    """Encoded sentences, row by row the same one about different things.

    target: about a target. neutral: about its anchor, or "". near: about another phrase of the target, or the same if
    it has one only. far: about each of some unrelated words.
    """

    target: Shown
    neutral: Condition
    near: Shown
    far: tuple[Shown, ...]

    @classmethod
    def of(
        cls,
        model: Generator,
        lines: tuple[list[Wording], list[str], list[Wording]],
        irrelevant: Sequence[str],
        scales: Sequence[float],
    ) -> "Asked":
        """Encode what `turns` gave, for a guidance-distilled model at every scale.

        Raises InputError without unrelated words, and for one that is a target.
        """
        about, anchors, close = lines
        if not irrelevant or {line.phrase for line in about} & set(irrelevant):
            raise InputError(f"irrelevant is {irrelevant}; legal: one word or more, none of them a target")
        sides = (about, close, *([line.about(word) for line in about] for word in irrelevant))
        target, near, *far = (Shown.of(model, side, scales) for side in sides)
        return cls(target, at_scales(model.encode(anchors), scales), near, tuple(far))

    def walk(self, levels: Literal["own", "unrelated"], batch: int, guidance_scale: float, steps: int) -> Walk:
        """How states are drawn under the target's sentences, read at their own noise levels or at unrelated ones."""
        kind = Walk if levels == "own" else Unrelated
        return kind(prompts=self.target.cond, batch=batch, guidance_scale=guidance_scale, steps=steps)

    def said(self, teacher: Generator, state: State, which: Int[Tensor, "b"], blocks: Literal["all", "last"]) -> Goals:
        """What a teacher says at b states: velocity under neutral and target, features of near "b n" and far "b k n".

        Features are where it attends to those words, see `feature`.
        """
        n, c = predict_each(teacher, state, [self.neutral.take(which), self.target.cond.take(which)])
        rows = (other.take(which) for other in (self.near, *self.far))
        near, *far = (feature(attended(teacher, state, row, blocks)[1], row.columns) for row in rows)
        return n, c, near, torch.stack(far, 1)


def turns(
    request: Request, template: str, share: float, count: int, rng: torch.Generator
) -> tuple[list[Wording], list[str], list[Wording]]:
    """`count` sentences about the targets' phrases in turn, at least one each; the same about the anchors, and near.

    share: of them with shuffled words. An anchor's sentence is "" where there is none; near is about the phrase before
    in the same concept's list, in a circle.
    """
    pairs = list(request.pairs)
    near = [c.prompts[i - 1] for c in request.target for i in range(len(c.prompts))]
    order = [i % len(pairs) for i in range(max(len(pairs), count))]
    lines = wordings(template, [pairs[i][0] for i in order], share, rng)
    anchors = [x.about(pairs[i][1]).text if pairs[i][1] else "" for x, i in zip(lines, order, strict=True)]
    return lines, anchors, [line.about(near[i]) for line, i in zip(lines, order, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Unrelated(Walk):
    """States as EraseAnything's released code comes by them: the first noise of a path, read at any noise level.

    Its 28 steps move x by 0.028 of the way, from sigma 1 to 0.972, here by none, and then ask at a uniform t that x
    has nothing to do with.
    """

    def visited(self, walker: Generator, which: Int[Tensor, "n"], rng: torch.Generator) -> State:
        """Draw noise for the chosen prompts, and a t in [0, 1) for each."""
        start = walker.visit(self.prompts.take(which), rng=rng, guidance_scale=self.guidance_scale, steps=1)
        return State(start.x, torch.rand(len(which), generator=rng).to(start.x.device))
