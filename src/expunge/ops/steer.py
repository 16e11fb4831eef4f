"""A guard that asks the network about targets and anchors at every state of the sampler."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.condition import GUIDANCE, Condition
from expunge.core.errors import InputError
from expunge.core.generator import Generator, State
from expunge.ops.trajectory import predict_each
from expunge.patches.guard import PassGuard

Removed = Callable[[Tensor, Tensor, list[Tensor], list[Tensor]], Tensor]


@dataclass(frozen=True)
class Steer(PassGuard):
    """Subtracts from the guided prediction what `removed` says.

    removed(guided, uncond, targets, anchors), all at the sampler's scale. window: lowest and highest t with an
    intervention; None is none at all, and then nothing more is asked of the network.
    """

    removed: Removed
    target: Condition
    anchor: Condition
    window: tuple[float, float] | None

    def combine(
        self,
        model: Generator,
        state: State,
        cond: Float[Tensor, "b ..."],
        uncond: Float[Tensor, "b ..."],
        scale: float,
    ) -> Float[Tensor, "b ..."]:
        """Guide as the sampler would, then subtract."""
        guided = super().combine(model, state, cond, uncond, scale)
        inside = self._inside(state)
        if not bool(inside.any()):
            return guided
        preds = predict_each(model, state, self._rows(state, scale))
        # An embedded scale has already been applied by the network; a true one is applied here.
        embedded = GUIDANCE in self.target.extra
        whole = [pred if embedded else uncond + scale * (pred - uncond) for pred in preds]
        count = len(self.target)
        taken = self.removed(guided, uncond, whole[:count], whole[count:])
        return torch.where(inside[:, None, None, None], guided - taken, guided)

    def _inside(self, state: State) -> Tensor:
        if state.t is None:
            raise InputError("steering needs a denoiser's state; this one has no noise level t")
        if self.window is None:
            return torch.zeros_like(state.t, dtype=torch.bool)
        return (state.t >= self.window[0]) & (state.t <= self.window[1])

    def _rows(self, state: State, scale: float) -> list[Condition]:
        every = Condition.cat([self.target, self.anchor]).at(scale).to(state.x.device)
        same = torch.zeros(len(state.x), dtype=torch.long, device=state.x.device)
        return [every.take(same + index) for index in range(len(every))]
