"""The one training loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.eraser import Kept, Run
from expunge.core.errors import InputError
from expunge.ops.descent import Descent
from expunge.ops.student import Learner


@torch.enable_grad()
def fit(
    student: Learner,
    loss: Callable[[int], Float[Tensor, ""]],
    run: Run,
    *,
    steps: int,
    lr: float | Sequence[float],
    clip: float | None = None,
    until: Callable[[], bool] | None = None,
    state: Sequence[Tensor] | None = None,
) -> None:
    """Move a student's masters down a loss with Adam at a constant step size, without weight decay.

    loss: gives the scalar of a step, counted from 0. lr: several step sizes take turns, as losses may. clip: bound on
    the norm of all gradients together. until: asked after every step, True ends the loop early. state: tensors that the
    loss changes in place from step to step, () for none; with them, and a place in the run for unfinished trainings,
    the loop goes on where it was killed and ends at the very bits it would have. None: the loss keeps more than
    tensors, and the loop starts anew. Every step logs "loss" and "grad_norm" (before clipping) to the run and reports
    progress. Raises InputError for steps < 1 and when the loss is no longer finite; the masters then hold the last
    finite step.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; legal: 1 and above")
    turns = [lr] if isinstance(lr, float | int) else list(lr)
    descent = Descent(student.parameters, lr=turns[0], clip=clip)
    kept = None if state is None or run.kept is None else Unfinished(descent, state, run.kept, f"fit-{run.seed}")
    try:
        for step in range(kept.done() if kept else 0, steps):
            value = loss(step)
            if not bool(torch.isfinite(value)):
                raise InputError(f"the loss is {value.item()} at step {step}; lower lr (now {lr})")
            norm = descent.step(value, turns[step % len(turns)])
            run.log("loss", step, value.item())
            run.log("grad_norm", step, norm.item())
            ended = until is not None and until()
            if kept:
                kept.reached(step + 1, last=ended or step + 1 == steps)
            run.progress("fit", steps if ended else step + 1, steps)
            if ended:
                break
    finally:
        descent.close()


@dataclass(frozen=True)
class Unfinished:
    """A training's state in the place where it is kept, under a name of its own."""

    descent: Descent
    state: Sequence[Tensor]
    kept: Kept
    name: str

    @torch.no_grad()
    def done(self) -> int:
        """Steps that were made before the kill; masters, moments and the loss's own tensors are as they were then."""
        found = self.kept.load(self.name)
        if not found:
            return 0
        self.descent.restore(found)
        for i, own in enumerate(self.state):
            own.copy_(found[f"state.{i}"])
        return int(found["done"])

    def reached(self, done: int, *, last: bool) -> None:
        """Save every `every` steps, and at the end: a method may train several times."""
        if last or done % self.kept.every == 0:
            own = {f"state.{i}": tensor.detach() for i, tensor in enumerate(self.state)}
            self.kept.save(self.name, {**self.descent.tensors(), **own, "done": torch.tensor(done)})


def accumulate(parameters: Sequence[Tensor]) -> None:
    """From now on, give every backward pass the sum of all gradients since, as a loop that never zeroes them does."""
    for parameter in parameters:
        total = torch.zeros_like(parameter)

        def summed(grad: Tensor, total: Tensor = total) -> Tensor:
            return total.add_(grad).clone()

        parameter.register_hook(summed)
