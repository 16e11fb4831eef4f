"""The one training loop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.eraser import Kept, Run, Watch
from expunge.core.errors import InputError
from expunge.ops.descent import Descent
from expunge.ops.student import Learner


class Diverged(InputError):
    """A loss or a gradient that is not finite; `steps` before it were, and can be made again: 0 if they cannot."""

    def __init__(self, said: str, steps: int) -> None:
        super().__init__(said)
        self.steps = steps


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

    loss: gives a scalar for each number drawn, counted from 0. A step averages `run.parts` of them, over processes and
    over backward passes that add up; number n belongs to step n // parts. lr: several step sizes take turns, as losses
    may. clip: bound on the norm of all gradients together. until: asked after every step, True ends the loop early.
    state: tensors that the loss changes in place from step to step, () for none; with them, and a place in the run for
    unfinished trainings, the loop goes on where it was killed and ends at the very bits it would have. None: the loss
    keeps more than tensors, and the loop starts anew. Every step logs "loss" and "grad_norm" (before clipping) to the
    run and reports progress. The run's watch is shown the model; where it says no, the masters go back to what it saw
    before. Raises InputError for steps < 1, for a student without parameters and for a no at the first look; Diverged
    when the loss or the gradient is no longer finite. After such a loss the masters hold the last finite step; after
    such a gradient none is NaN, but some have moved.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; legal: 1 and above")
    if not student.parameters:
        raise InputError(
            f"nothing of {student.model.name!r} would be trained; choose a group of parameters that it has"
        )
    turns = [lr] if isinstance(lr, float | int) else list(lr)
    descent = Descent(student.parameters, lr=turns[0], clip=clip, average=run.average)
    watched = Watched(student, run.watch) if run.watch else None
    own = None if state is None else (*state, *(watched.state if watched else ()))
    kept = None if own is None or run.kept is None else Unfinished(descent, own, run.kept, f"fit-{run.seed}")
    try:
        for step in range(kept.done() if kept else 0, steps):
            descent.begin(turns[step % len(turns)], run.accumulate)
            value = backward(loss, run.draws(step), run)
            run.log("loss", step, value)
            again = step if kept else 0
            check_finite(f"the loss is {value} at step {step}; lower lr (now {lr})", value, again)
            norm = descent.end().item()
            run.log("grad_norm", step, norm)
            check_finite(f"the gradient's norm is {norm} at step {step}; lower lr (now {lr})", norm, again)
            refused = watched is not None and not watched.allows(step + 1, run, last=step + 1 == steps)
            ended = refused or (until is not None and agreed(until(), run))
            done = steps if ended else step + 1
            if kept:
                kept.reached(done, last=done == steps)
            run.progress("fit", done, steps)
            if ended:
                break
    finally:
        descent.close()


def check_finite(said: str, value: float, steps: int) -> None:
    """Raise Diverged unless a number is finite."""
    if not math.isfinite(value):
        raise Diverged(said, steps)


def backward(loss: Callable[[int], Float[Tensor, ""]], draws: Sequence[int], run: Run) -> float:
    """Add up the gradients of a step's losses over their number; gives their mean over all processes.

    Stops before the backward pass of the first that is not finite on any process, and gives that.
    """
    total = 0.0
    for n in draws:
        value = loss(n)
        seen = value.detach().clone()
        run.average([seen])
        if not bool(torch.isfinite(seen)):
            return seen.item()
        (value / len(draws)).backward()
        total += seen.item() / len(draws)
    return total


def agreed(vote: bool, run: Run) -> bool:
    """Whether most processes say yes: where they round differently they must still go the same way."""
    votes = torch.tensor(float(vote))
    run.average([votes])
    return votes.item() >= 0.5


class Watched:
    """A training under someone's eyes: what was allowed last is remembered."""

    def __init__(self, student: Learner, watch: Watch) -> None:
        self.student, self.watch = student, watch
        self.looks = torch.zeros((), dtype=torch.long)
        self.allowed = [master.detach().clone() for master in student.parameters] if watch.judges else []

    @property
    def state(self) -> tuple[Tensor, ...]:
        """Tensors that change from look to look."""
        return (self.looks, *self.allowed) if self.watch.judges else ()

    @torch.no_grad()
    def allows(self, done: int, run: Run, *, last: bool) -> bool:
        """Show the model if it is time; after a no, put the masters back to what was allowed last."""
        if done % self.watch.every and not last:
            return True
        judged = self.watch(done, self.student.view(), last=last)
        if judged is None:
            return True
        allowed = agreed(judged, run)
        if not allowed and not self.looks:
            raise InputError(f"after {done} steps, at the first look: {self.watch}; allow more, or lower lr")
        sides = (self.allowed, self.student.parameters)
        for new, old in zip(*(sides if allowed else sides[::-1]), strict=True):
            new.copy_(old)
        self.looks += int(allowed)
        return allowed


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


def accumulate(parameters: Sequence[Tensor]) -> list[Tensor]:
    """From now on, give every backward pass the sum of all gradients since, as a loop that never zeroes them does.

    Gives the sums, which change in place.
    """
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, total in zip(parameters, totals, strict=True):

        def summed(grad: Tensor, total: Tensor = total) -> Tensor:
            return total.add_(grad).clone()

        parameter.register_hook(summed)
    return totals
