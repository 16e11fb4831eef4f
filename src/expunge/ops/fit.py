"""The one training loop."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.eraser import Run
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
) -> None:
    """Move a student's masters down a loss with Adam at a constant step size, without weight decay.

    loss: gives the scalar of a step, counted from 0. lr: several step sizes take turns, as losses may. clip: bound on
    the norm of all gradients together. until: asked after every step, True ends the loop early. Every step logs "loss"
    and "grad_norm" (before clipping) to the run and reports progress. Raises InputError for steps < 1 and when the loss
    is no longer finite; the masters then hold the last finite step.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; legal: 1 and above")
    turns = [lr] if isinstance(lr, float | int) else list(lr)
    descent = Descent(student.parameters, lr=turns[0], clip=clip)
    try:
        for step in range(steps):
            value = loss(step)
            if not bool(torch.isfinite(value)):
                raise InputError(f"the loss is {value.item()} at step {step}; lower lr (now {lr})")
            norm = descent.step(value, turns[step % len(turns)])
            run.log("loss", step, value.item())
            run.log("grad_norm", step, norm.item())
            ended = until is not None and until()
            run.progress("fit", steps if ended else step + 1, steps)
            if ended:
                break
    finally:
        descent.close()


def accumulate(parameters: Sequence[Tensor]) -> None:
    """From now on, give every backward pass the sum of all gradients since, as a loop that never zeroes them does."""
    for parameter in parameters:
        total = torch.zeros_like(parameter)

        def summed(grad: Tensor, total: Tensor = total) -> Tensor:
            return total.add_(grad).clone()

        parameter.register_hook(summed)
