"""What the guidance-distilled model answers at a scale, against the formula it was taught: v_u + g (v_c − v_u)."""

import pytest
import torch

from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.models.load import load

SCALES = (1.0, 3.0, 5.0)
PROMPTS = ["a flat picture of a strawberry on a blue background", "a ink picture of a car", "a cat", "violin"] * 4
# Measured when this was written, on three seeds of the walk: 0.12 to 0.13, 0.18 to 0.20, 0.31 to 0.35.
BOUNDS = {1.0: 0.2, 3.0: 0.28, 5.0: 0.45}


@pytest.fixture(scope="module")
def pair() -> tuple[Generator, Generator]:
    return load("emoji-flux"), load("emoji-flux-distilled")


@pytest.mark.parametrize("scale", SCALES)
@torch.no_grad()
def test_a_scale_is_answered_by_its_own_formula(pair: tuple[Generator, Generator], scale: float) -> None:
    """‖v_g − (v_u + g (v_c − v_u))‖ over ‖v_u + g (v_c − v_u)‖ of 16 states of the teacher's path guided by g.

    Asked at another of these scales, the same network misses by more, and at one of the two by far: by 6.6, 1.9 and 1.9
    times as much when this was written.
    """
    teacher, student = pair
    cond = teacher.encode(PROMPTS)
    state = teacher.visit(cond, rng=Run().rng("distilled"), guidance_scale=scale, steps=8)
    u, c = teacher.predict(state, teacher.encode([""])), teacher.predict(state, cond)
    goal, asked = u + scale * (c - u), student.encode(PROMPTS)
    missed = {g: float((student.predict(state, asked.at(g)) - goal).norm() / goal.norm()) for g in SCALES}
    others = [missed[g] for g in SCALES if g != scale]
    assert missed[scale] < BOUNDS[scale], missed
    assert min(others) > missed[scale] and max(others) > 1.4 * missed[scale], missed
