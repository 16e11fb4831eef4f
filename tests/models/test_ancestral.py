"""The ancestral sampler: DDPM's own law of each step, noise in the last one too, and paths that can be compared."""

import pytest
import torch
from diffusers import DDPMScheduler

from expunge.core.errors import InputError
from expunge.models.load import load
from expunge.patches.guard import PassGuard

from .conftest import PROMPTS

FLOOR = 0.05
DRAW = {"guidance_scale": 3.0, "steps": 5}


@pytest.fixture(params=["tiny-unet", "tiny-unet-v", "tiny-sdxl"])
def noisy(request):
    return load(request.param).ancestral(FLOOR)


class OneSentence(PassGuard):
    """Answers every prompt as the first."""

    def __init__(self, model):
        self.said = model.encode([PROMPTS[0]])

    def condition(self, cond):
        return self.said.take(torch.zeros(len(cond), dtype=torch.long))


def test_inner_steps_are_ddpms_where_every_level_is_walked():
    """Ho et al.'s posterior: mean (x - beta / sqrt(1 - a) eps) / sqrt(alpha), variance beta (1 - a') / (1 - a)."""
    model = load("tiny-unet").ancestral(1e-6)
    ours, theirs = (
        model._started(1000),
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    rng = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(2, 4, 8, 8, generator=rng) for _ in range(2))
    for time in (900, 500, 20):
        mean, spread = ours.law(eps, torch.tensor(time), x)
        a, before = (float(theirs.alphas_cumprod[t]) for t in (time, time - 1))
        beta = 1 - a / before
        torch.testing.assert_close(mean, (x - beta / (1 - a) ** 0.5 * eps) / (1 - beta) ** 0.5, rtol=1e-4, atol=1e-4)
        assert spread == pytest.approx((beta * (1 - before) / (1 - a)) ** 0.5, rel=1e-3)


def test_every_step_is_noisy_and_the_last_by_the_floor(noisy):
    _, noise = noisy.path_gaps(PROMPTS[:1], PROMPTS[1:2], seeds=[1], **DRAW)
    assert len(noise) == 5 and (noise >= FLOOR).all() and noise[0] > 2 * FLOOR
    louder = load(noisy.name).ancestral(0.3).path_gaps(PROMPTS[:1], PROMPTS[1:2], seeds=[1], **DRAW)[1]
    assert float(noise[-1]) < 0.3 == pytest.approx(float(louder[-1]))


def test_pictures_are_the_seeds_own_and_unlike_the_quiet_samplers(noisy):
    quiet = load(noisy.name)
    both = noisy.generate(PROMPTS[:2], seeds=[1, 2], **DRAW)
    alone = noisy.generate(PROMPTS[1:2], seeds=[2], **DRAW)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    assert (both - quiet.generate(PROMPTS[:2], seeds=[1, 2], **DRAW)).abs().max() > 1e-3
    assert noisy.scheduler.config.prediction_type == quiet.scheduler.config.prediction_type


def test_paths_part_where_answers_do_and_nowhere_else(noisy):
    seeds = [3, 4]
    apart, noise = noisy.path_gaps(PROMPTS[:2], PROMPTS[1:], seeds=seeds, **DRAW)
    assert apart.shape == (2, 5) and (apart > 0).all() and noise.shape == (5,)
    same, _ = noisy.path_gaps(PROMPTS[:2], PROMPTS[:2], seeds=seeds, **DRAW)
    assert not same.any()
    gated = noisy.view(guards=[OneSentence(noisy)])
    hidden, _ = gated.path_gaps(PROMPTS[:2], PROMPTS[1:], seeds=seeds, **DRAW)
    assert not hidden.any()
    unguided, _ = noisy.path_gaps(PROMPTS[:2], PROMPTS[1:], seeds=seeds, guidance_scale=1.0, steps=5)
    torch.testing.assert_close(apart[:, 0], 3 * unguided[:, 0], rtol=1e-3, atol=1e-6)


def test_silent_samplers_and_floors_are_refused():
    with pytest.raises(InputError, match="DDIMScheduler has no noise in every step"):
        load("tiny-unet").path_gaps(PROMPTS[:1], PROMPTS[1:2], seeds=[1], **DRAW)
    for floor in (0.0, -1.0, 1.5):
        with pytest.raises(InputError, match=f"noise floor is {floor}"):
            load("tiny-unet").ancestral(floor)
