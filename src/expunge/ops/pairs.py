"""Pairs of sampler states that differ in what was asked for only: one start noise, one stopping point, two prompts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.generator import Generator, State
from expunge.ops.limits import at_least
from expunge.ops.rows import join_states, pick_state
from expunge.ops.trajectory import CHUNK, Goals, Teach, Walk


@dataclass(frozen=True)
class Pair:
    """b states walked under the prompts asked for, and their twins.

    which: the row of both prompts. goals: what the frozen model says at the states asked for, without gradient.
    """

    state: State
    twin: State
    which: Int[Tensor, "b"]
    goals: Goals

    def take(self, index: Int[Tensor, "n"]) -> "Pair":
        """Pick pairs by position; repeats are allowed."""
        goals = tuple(goal[index] for goal in self.goals)
        return Pair(pick_state(self.state, index), pick_state(self.twin, index), self.which[index], goals)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """How pairs are drawn: `size` of them walked by the student as it is now, anew every `refresh` steps.

    walk: how, and under which prompts asked for; twin: the prompts of their twins, row by row.
    The game is about what the student draws, so its own paths are needed; a walk for each step would be nearly all
    of the run's time. Raises InputError for a size or refresh below 1.
    """

    walk: Walk
    twin: Condition
    size: int
    refresh: int

    def __post_init__(self) -> None:
        at_least(self, {"size": 1, "refresh": 1})

    def walked(self, walker: Callable[[], Generator], teach: Teach, run: Run) -> "Walked":
        """Give the pairs of a step, counted from 0; steps are asked for in order."""
        return Walked(lambda turn: _joined(list(self._walk(walker(), teach, run, turn))), self.refresh)

    def _walk(self, walker: Generator, teach: Teach, run: Run, turn: int) -> Iterator[Pair]:
        shift = turn * self.size
        for start in range(0, self.size, CHUNK):
            which = torch.arange(shift + start, shift + min(start + CHUNK, self.size)) % len(self.twin)
            sides = [
                walk.visited(walker, which, run.rng("pair", turn, start))
                for walk in (self.walk, replace(self.walk, prompts=self.twin))
            ]
            yield Pair(sides[0], sides[1], which, teach(sides[0], which))


class Walked:
    """Pairs of a step, walked anew when their turn is over."""

    def __init__(self, walk: Callable[[int], Pair], refresh: int) -> None:
        self._walk, self._refresh = torch.no_grad()(walk), refresh
        self._turn, self._pair = torch.zeros((), dtype=torch.long), self._walk(0)

    @property
    def state(self) -> list[Tensor]:
        """All that changes from step to step, in place."""
        return [self._turn, *_tensors(self._pair)]

    def __call__(self, step: int) -> Pair:
        """Give the pairs of a step; those of the next turn overwrite them."""
        turn = step // self._refresh
        if turn != int(self._turn):
            for old, new in zip(self.state, [torch.tensor(turn), *_tensors(self._walk(turn))], strict=True):
                old.copy_(new)
        return self._pair


def _tensors(pair: Pair) -> list[Tensor]:
    parts = (pair.state.x, pair.state.t, pair.twin.x, pair.twin.t, pair.which, *pair.goals)
    return [part for part in parts if part is not None]


def _joined(parts: list[Pair]) -> Pair:
    states, twins = (join_states([getattr(part, side) for part in parts]) for side in ("state", "twin"))
    goals = tuple(torch.cat(goal) for goal in zip(*(part.goals for part in parts), strict=True))
    return Pair(states, twins, torch.cat([part.which for part in parts]), goals)
