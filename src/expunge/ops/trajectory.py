"""Where a trained eraser gets its states from: the sampler's own path, walked fresh or cached once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator, State
from expunge.ops.rows import join_states, pick_state

CHUNK = 16  # prompts walked together: bounds memory, changes no result's law

Goals = tuple[Float[Tensor, "b ..."], ...]
Teach = Callable[[State, Int[Tensor, "b"]], Goals]


@dataclass(frozen=True)
class Lesson:
    """A batch to learn from.

    state: b points on the sampler's path. which: the prompt row each was walked under. goals: what the frozen
    model says there, one tensor per goal, without gradient.
    """

    state: State
    which: Int[Tensor, "b"]
    goals: Goals


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How states are drawn: uniformly in the sampler's grid, on a path guided by guidance_scale.

    prompts: one row per prompt to walk under. batch: states per lesson. steps: length of the whole path; a state
    costs half of it on average. Raises InputError for a batch or path below 1.
    """

    prompts: Condition
    batch: int
    guidance_scale: float
    steps: int

    def __post_init__(self) -> None:
        _at_least_one("batch", self.batch)
        _at_least_one("walk", self.steps)

    def lessons(
        self, model: Generator, student: Callable[[], Generator], teach: Teach, run: Run, *, fresh: bool, size: int
    ) -> Callable[[int], Lesson]:
        """Lessons on paths of the student, `fresh` at every step, or on a pool of `size` states of the frozen model."""
        return self.fresh(student, teach, run) if fresh else self.pooled(model, teach, run, size=size)

    def fresh(self, walker: Callable[[], Generator], teach: Teach, run: Run) -> Callable[[int], Lesson]:
        """Lessons whose states are walked anew by walker() at every step; with a student, the paper's ESD."""

        def lesson(step: int) -> Lesson:
            which = torch.randint(len(self.prompts), (self.batch,), generator=run.rng("which", step))
            with torch.no_grad():
                state = self.visited(walker(), which, run.rng("visit", step))
                return Lesson(state, which, teach(state, which))

        return lesson

    def pooled(self, walker: Generator, teach: Teach, run: Run, *, size: int) -> Callable[[int], Lesson]:
        """Lessons drawn from `size` states walked and taught once, up front, prompts taking turns.

        Each step draws `batch` of them with replacement. With a frozen walker the law of a state is that of
        `fresh`; what is lost is variety, what is saved is nearly all of the run's time. Raises InputError for a pool
        that leaves a prompt out.
        """
        if size < len(self.prompts):
            raise InputError(f"pool is {size}; legal: {len(self.prompts)} (the number of prompts) and above")
        which = torch.arange(size) % len(self.prompts)
        with torch.no_grad():
            lessons = list(self._taught(walker, teach, which, run))
        state = join_states([lesson.state for lesson in lessons])
        goals = tuple(torch.cat(parts) for parts in zip(*(lesson.goals for lesson in lessons), strict=True))

        def lesson(step: int) -> Lesson:
            index = torch.randint(size, (self.batch,), generator=run.rng("pool", step))
            return Lesson(pick_state(state, index), which[index], tuple(goal[index] for goal in goals))

        return lesson

    def _taught(self, walker: Generator, teach: Teach, which: Tensor, run: Run) -> Iterator[Lesson]:
        for start in range(0, len(which), CHUNK):
            run.progress("walking", start, len(which))
            rows = which[start : start + CHUNK]
            state = self.visited(walker, rows, run.rng("visit", start))
            yield Lesson(state, rows, teach(state, rows))
        run.progress("walking", len(which), len(which))

    def visited(self, walker: Generator, which: Int[Tensor, "n"], rng: torch.Generator) -> State:
        """Walk the chosen prompts, each to a point of its own."""
        return walker.visit(self.prompts.take(which), rng=rng, guidance_scale=self.guidance_scale, steps=self.steps)


def uncond_drift(student: Generator, base: Generator, state: State) -> Float[Tensor, "b"]:
    """How far an edited model's unconditional prediction has moved from the base model's, per state.

    ‖eps_student(x_t, t, "") − eps_base(x_t, t, "")‖², in the base model's own distance (mean over elements for
    denoisers). Every guided sample contains this prediction, so its drift changes every prompt.
    """
    uncond = base.encode([""] * len(state.x))
    with torch.no_grad():
        return base.distance(student.predict(state, uncond), base.predict(state, uncond))


def predict_each(model: Generator, state: State, conds: Sequence[Condition]) -> Goals:
    """Predictions of one model at the same b states under several conditions, from one batched forward."""
    size = len(state.x)
    every = pick_state(state, torch.arange(size).repeat(len(conds)))
    return model.predict(every, Condition.cat(conds)).split(size)


def _at_least_one(what: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{what} is {value}; legal: 1 and above")
