"""How far a training has moved what it should have left alone."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.generator import Generator, State
from expunge.ops.trajectory import Walk

SIZE, STEPS, GUIDANCE_SCALE = 16, 20, 3.0  # states of each side at least, and the paths they lie on


@dataclass(frozen=True)
class Collateral:
    """Change of what should stay, in units of what the target means to the model.

    collateral = mean ‖f(x_t, r) − f_0(x_t, r)‖² / mean ‖f_0(x_t, c) − f_0(x_t, "")‖²,
    f the edited model's prediction and f_0 the frozen one's; retained prompts r and "" take turns at states of their
    own guided paths, targets c at states of theirs. 0: nothing has moved. 1: as far as the target's prediction lies
    from the unconditional one. Ours.
    """

    model: Generator
    state: State
    cond: Condition
    before: Float[Tensor, "b ..."]
    power: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: Generator, request: Request, run: Run) -> "Collateral":
        """Walk the states once, by the frozen model."""
        stays = [prompt for concept in request.retain for prompt in concept.prompts]
        state, cond = _walked(model, ["", *stays], run, "collateral")
        aimed, target = _walked(model, [phrase for phrase, _ in request.pairs], run, "target's power")
        uncond = model.encode([""] * len(target))
        power = model.distance(model.predict(aimed, target), model.predict(aimed, uncond)).mean().item()
        return cls(model, state, cond, model.predict(state, cond), power)

    @torch.no_grad()
    def __call__(self, view: Generator) -> float:
        """Give the collateral of an edited model."""
        moved = self.model.distance(view.predict(self.state, self.cond), self.before)
        return moved.mean().item() / self.power


def _walked(model: Generator, prompts: list[str], run: Run, name: str) -> tuple[State, Condition]:
    turns = torch.arange(max(SIZE, len(prompts))) % len(prompts)
    encoded = model.encode(prompts)
    walk = Walk(prompts=encoded, batch=1, guidance_scale=GUIDANCE_SCALE, steps=STEPS)
    return walk.visited(model, turns, run.rng(name)), encoded.take(turns)
