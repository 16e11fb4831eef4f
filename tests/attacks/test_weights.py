"""Relearning on tiny models, and the goal it trains on."""

from dataclasses import replace

import pytest
import torch

from expunge.attacks.weights.relearning import Relearning
from expunge.core.attack import Aim
from expunge.core.concept import Concept
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.models.load import load
from expunge.ops.denoising import denoising_loss
from expunge.ops.glyph import glyphs

CAT = Concept(name="cat", prompts=("cat",))
SHORT = Relearning(steps=12, lr=1e-2, batch=4, curve=(1, 4))


def lesson(model: Generator) -> Aim:
    size = model.generate(["cat"], seeds=[0], guidance_scale=1.0, steps=1).shape[2:]
    images = glyphs(4, *size, Run().rng("lesson"))
    return Aim(concept=CAT, prompts=("a cat",), seeds=(0,), images=images, captions=("a picture of a cat",) * 4)


def loss(model: Generator, aim: Aim) -> float:
    assert aim.images is not None
    cond = model.encode(aim.captions[:1] * 32)
    clean = model.absorb(aim.images).repeat(8, 1, 1, 1)
    return float(denoising_loss(model, clean, cond, Run(seed=9), ("held out",)).mean())


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-sd3"])
def test_relearning_learns_what_it_is_shown(name: str) -> None:
    model = load(name)
    aim = lesson(model)
    attempts = list(SHORT.search(model, aim, Run(), reference=model))
    assert [each.step for each in attempts] == [1, 4, 12]
    assert [each.gradients for each in attempts] == [4, 16, 48]
    assert loss(attempts[-1].model, aim) < loss(attempts[0].model, aim) < loss(model, aim) * 1.02
    assert attempts[-1].prompts == aim.prompts


def test_a_step_of_nothing_brings_nothing_back() -> None:
    model = load("tiny-unet")
    aim = lesson(model)
    *_, last = replace(SHORT, lr=1e-30, steps=2).search(model, aim, Run(), reference=model)
    for path in model.select("attention"):
        assert torch.equal(last.model.weight(path), model.weight(path))


def test_luck_moves_every_matrix_as_far_and_no_nearer() -> None:
    model = load("tiny-unet")
    aim = lesson(model)
    *_, last = replace(SHORT, steps=3).search(model, aim, Run(), reference=model)
    (lucky,) = SHORT.random(model, aim, Run(), reference=model, found=last)
    moved = 0
    for path, weight in model.select("attention").items():
        far = (last.model.weight(path) - weight).norm()
        assert torch.allclose((lucky.model.weight(path) - weight).norm(), far, rtol=1e-3, atol=1e-6)
        moved += bool(far > 0)
    assert moved > 0


@pytest.mark.parametrize("field", ["steps", "batch", "images", "rank"])
def test_a_budget_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"{field} is 0; legal: 1"):
        Relearning(**{field: 0})
