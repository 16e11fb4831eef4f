"""Up into noise and down again: shares of the mixture, and a walk that is its own inverse as steps grow."""

import pytest
import torch

from expunge.core.errors import InputError
from expunge.core.generator import State
from expunge.models.load import load
from expunge.ops.purify import LAST, descended, inverted, levels, mixture

NAMES = ("tiny-unet", "tiny-unet-v", "tiny-flux")


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_the_mixture_of_what_any_prediction_implies(name):
    model = load(name)
    x, pred = (torch.randn(2, *model.latent, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for t in (0.1, 0.5, 0.9):
        state = State(x=x, t=torch.full((2,), t))
        s, sigma = mixture(model, x, torch.tensor(t))
        torch.testing.assert_close(s * model.as_clean(state, pred) + sigma * model.as_eps(state, pred), x)
        power = (s + sigma) if name == "tiny-flux" else (s**2 + sigma**2)
        torch.testing.assert_close(power, torch.ones_like(power))


@pytest.mark.parametrize("name", NAMES)
def test_down_undoes_up_the_better_the_more_steps(name):
    model = load(name)
    clean = torch.randn(2, *model.latent, generator=torch.Generator().manual_seed(0))
    cond, uncond = model.encode(["red"]), model.encode([""])
    walk = {"guidance_scale": 1.0, "depth": 0.5}

    def error(steps: int) -> float:
        noisy = inverted(model, clean, cond, steps, 0.5)
        return (descended(model, noisy, cond, uncond, steps=steps, **walk) - clean).norm().item() / clean.norm().item()

    few, many = error(5), error(40)
    assert many < 0.5 * few
    noisy = inverted(model, clean, cond, 40, 0.5)
    other = descended(model, noisy, model.encode(["green stripes"]), uncond, steps=40, guidance_scale=5.0, depth=0.5)
    assert (other - clean).norm() > 2 * many * clean.norm()


def test_levels_rise_from_a_clean_picture_to_the_depth():
    assert torch.equal(levels(4, 1.0), torch.linspace(0, LAST, 5))
    for steps, depth in ((0, 0.5), (3, 0.0), (3, 1.5)):
        with pytest.raises(InputError, match="legal"):
            levels(steps, depth)
