"""The path row on a linear-Gaussian diffusion, where every divergence is known on paper."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.leakage.twins import Twin
from expunge.models._diffusion import Diffusion
from expunge.models.load import load
from expunge.patches.guard import PassGuard
from expunge.stages._arms import Plan
from expunge.stages._path import path_row, walkable

FLOOR, STEPS, SCALE, GAIN, SIZE = 0.2, 5, 3.0, 0.4, 16
TWINS = [Twin(pair, "a cat", "a dog") for pair in range(5)]
PLAN = Plan(model_sha256="", patch_sha256="", prompts_sha256="", steps=STEPS, guidance_scale=SCALE, seed=0, batch=2)


class Linear(Diffusion):
    """eps(x, c) = 0.4 x + b(c): b is `gap` everywhere for a cat and 0 for all else."""

    def __init__(self, gap: float) -> None:
        super().__init__("linear", "unet", {"unet": nn.Linear(1, 1, dtype=torch.float64)})
        self.gap, self.latent = gap, (4, 2, 2)
        self.scheduler = DDIMScheduler(beta_start=0.001, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")

    def encode(self, prompts: Sequence[str]) -> Condition:
        rows = torch.tensor([[[self.gap * ("cat" in prompt)]] for prompt in prompts], dtype=torch.float64)
        ones = torch.ones(len(prompts), 1)
        return Condition(tokens=rows, mask=ones.bool(), last=torch.zeros(len(prompts), dtype=torch.long))

    def predict_at(self, x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        return GAIN * x + cond.tokens[:, :, :, None]

    def _silent(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("paths ask for predictions only")

    check_prompt = absorb = sites = decode = _paths = _silent


class CatsAreDogs(PassGuard):
    """A gate: every prompt is answered as its twin."""

    def condition(self, cond: Condition) -> Condition:
        return Condition(tokens=0 * cond.tokens, mask=cond.mask, last=cond.last)


def on_paper(gap: float) -> tuple[float, float]:
    """KL of the paths, and of the last x, which is normal in both arms with one variance; DDPM's posterior per step."""
    bars = torch.cumprod(1 - torch.linspace(0.001, 0.02, 1000, dtype=torch.float64), 0).tolist()
    times = [999 - 200 * index for index in range(STEPS)]
    path, apart, variance = 0.0, 0.0, 1.0
    for here, there in zip(times, [*times[1:], None], strict=True):
        a, after = bars[here], 1.0 if there is None else bars[there]
        alpha = a / after
        push = (1 - alpha) / math.sqrt((1 - a) * alpha)
        sigma = FLOOR if there is None else math.sqrt((1 - alpha) * (1 - after) / (1 - a))
        assert sigma >= FLOOR
        path += SIZE * (push * SCALE * gap) ** 2 / (2 * sigma**2)
        keep = 1 / math.sqrt(alpha) - push * GAIN
        apart, variance = keep * apart + push * SCALE * gap, keep**2 * variance + sigma**2
    return path, SIZE * apart**2 / (2 * variance)


@pytest.mark.parametrize("gap", [0.003, 0.01])
def test_divergences_are_those_on_paper_and_above_that_of_the_pictures(gap: float) -> None:
    model = Linear(gap).ancestral(FLOOR)
    row = path_row(model, model, TWINS, PLAN, Run())
    path, picture = on_paper(gap)
    assert row.kl10 == pytest.approx(path, rel=1e-5) and row.kl01 == pytest.approx(path, rel=1e-5)
    assert 0 < picture < path and not row.vacuous
    assert row.I_hi == pytest.approx(min(path / (2 * math.log(2)), math.sqrt(1 - math.exp(-path))), rel=1e-5)


def test_the_base_is_all_of_itself_and_half_the_gap_a_quarter() -> None:
    base, half = Linear(0.01).ancestral(FLOOR), Linear(0.005).ancestral(FLOOR)
    assert path_row(base, base, TWINS, PLAN, Run()).base_ratio == 1
    assert path_row(half, base, TWINS, PLAN, Run()).base_ratio == pytest.approx(0.25)
    assert path_row(base, Linear(0.0).ancestral(FLOOR), TWINS, PLAN, Run()).base_ratio is None


def test_behind_a_gate_nothing_leaks_and_a_wide_gap_is_vacuous() -> None:
    base = Linear(1.0).ancestral(FLOOR)
    gated = path_row(base.view(guards=[CatsAreDogs()]), base, TWINS, PLAN, Run())
    assert (gated.kl10, gated.kl01, gated.I_hi, gated.base_ratio, gated.vacuous) == (0, 0, 0, 0, False)
    open_ = path_row(base, base, TWINS, PLAN, Run())
    assert open_.vacuous and open_.I_hi == 1


def test_models_whose_sampler_adds_no_noise_are_refused() -> None:
    with pytest.raises(InputError, match="family 'mmdit' has no ancestral sampler"):
        walkable(load("tiny-flux"))
    with pytest.raises(InputError, match="DDIMScheduler has no noise in every step"):
        path_row(Linear(0.01), Linear(0.01), TWINS, PLAN, Run())
