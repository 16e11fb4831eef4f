"""What a guided model answers where guided pictures come from, kept to be learned from more than once.

A student of v_u + g (v_c - v_u) that has only seen straight paths from pictures is drawn where it never was: guided
paths leave them, the further the larger g. So paths are walked here from noise, half of them by the teacher and half
by the student itself, whose own small errors it is thus told to mend; the teacher answers at every state of both.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from training import keeping

STEPS = 25  # of a walk, each at a place of its own: between two steps a student is asked nowhere
ROOM = 16_384  # lessons kept by one process
RARE = 100  # steps between two walks, all processes at once: of 32 paths a lesson is then met twice, at 16 a step

Answer = Callable[[Tensor, Tensor, list[str], Tensor], Tensor]
"""Velocity at states "b n d", levels "b", under captions and scales "b"."""


class Paths:
    """Lessons (x, t, scale, caption, velocity) from paths that teacher and student walk."""

    def __init__(self, teacher: Answer, student: Answer, captions: Callable[[torch.Generator], list[str]]) -> None:
        """`captions` gives those of one round of paths."""
        self.teacher, self.student, self.captions = teacher, student, captions
        self.kept: list[tuple[Tensor, Tensor, Tensor, str, Tensor]] = []

    def draw(self, n: int, random: torch.Generator, step: int) -> tuple[Tensor, Tensor, Tensor, list[str], Tensor]:
        """States, levels, scales, captions and velocities of n lessons; new paths first where too few are known."""
        if len(self.kept) < ROOM // 4 or step % RARE == 0:
            self.kept = (self.kept + self.walk(random))[-ROOM:]
        chosen = [self.kept[int(i)] for i in torch.randint(len(self.kept), (n,), generator=random)]
        x, t, scale, captions, v = zip(*chosen, strict=True)
        return torch.stack(x).float(), torch.stack(t), torch.stack(scale), list(captions), torch.stack(v).float()

    def tensors(self) -> dict[str, Tensor]:
        """What is kept: a walk of the student's cannot be made again once it has learned on."""
        return keeping.packed(self.kept)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep these lessons in place of others."""
        self.kept = keeping.unpacked(tensors)

    @torch.no_grad()
    def walk(self, random: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor, str, Tensor]]:
        """One round of paths from noise at scales in [1, 5], x ← x + (t' - t) v; the teacher answers at every state."""
        captions = self.captions(random)
        n = len(captions)
        x = torch.randn(n, 16, 64, generator=random)
        scale = 1 + 4 * torch.rand(n, generator=random)
        own = torch.arange(n) % 2 == 1
        offset, found = torch.rand(n, generator=random), []
        for step in range(STEPS):
            t, after = (self._level(offset, step + k) for k in (0, 1))
            v = self.teacher(x, t, captions, scale)
            found += list(zip(x.half(), t, scale, captions, v.half(), strict=True))
            walked = torch.where(own[:, None, None], self.student(x, t, captions, scale), v)
            x = x + (after - t)[:, None, None] * walked
        return found

    @staticmethod
    def _level(offset: Tensor, step: int) -> Tensor:
        """From 1 at first to 0 at last, in between one step wide from path to path."""
        return torch.ones_like(offset) if step == 0 else ((STEPS - step - offset + 0.5) / STEPS).clamp(0, 1)
