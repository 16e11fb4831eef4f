"""States are on the sampler's own trajectory, x at exactly the noise level of the t that comes with it."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from expunge.core.errors import InputError
from expunge.core.generator import Hook, State
from expunge.models import _denoiser
from expunge.models.load import load
from expunge.models.tiny import tiny_pipeline
from expunge.models.unet import UNetGenerator

from .conftest import NAMES, PROMPTS, seeded

MEAN = 1.5  # the synthetic data set: one latent, all its values MEAN


def level(model, timestep):
    """alphas_cumprod at a timestep in float64, written here a second time; sigma is linear between whole ones."""
    a = model.scheduler.alphas_cumprod.double()
    sigma = ((1 - a) / a.clamp(min=1e-12)).sqrt()
    low = timestep.double().floor()
    between = torch.lerp(sigma[low.long()], sigma[timestep.ceil().long()], timestep.double() - low)
    return torch.where(timestep == low, a[low.long()], 1 / (1 + between**2))


def oracle(model):
    """The view whose network is the exact denoiser of that data set: eps = (x - sqrt(a) MEAN) / sqrt(1 - a)."""

    def run(module, inputs, output):
        x, timestep = inputs[0], torch.as_tensor(inputs[1], dtype=torch.float64)
        a = level(model, timestep).reshape(-1, 1, 1, 1)
        eps = (x.double() - a.sqrt() * MEAN) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * MEAN
        return ((eps if model.scheduler.config.prediction_type == "epsilon" else v).to(x.dtype),)

    return model.view(hooks=[Hook("unet", run)])


def built(name, scheduler=None, **config):
    pipeline = tiny_pipeline(name)
    cls = scheduler or type(pipeline.scheduler)
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **config)
    return UNetGenerator(pipeline, name)


def noise_at(model, state, timestep):
    a = level(model, timestep)[:, None, None, None]
    return (state.x - a.sqrt() * MEAN) / (1 - a).sqrt()


CASES = [
    ("tiny-unet", DDIMScheduler, 50),
    ("tiny-unet", DDIMScheduler, 25),
    ("tiny-unet-v", DDIMScheduler, 25),
    ("tiny-unet", PNDMScheduler, 20),
    ("tiny-unet", HeunDiscreteScheduler, 20),
    ("tiny-unet", DPMSolverMultistepScheduler, 20),
    ("tiny-unet-v", UniPCMultistepScheduler, 20),
    ("tiny-unet", LMSDiscreteScheduler, 20),
    ("tiny-sdxl", EulerDiscreteScheduler, 20),
]


@pytest.mark.parametrize(("name", "scheduler", "steps"), CASES)
def test_x_has_exactly_the_noise_level_of_t(name, scheduler, steps):
    """On point data the noise never changes along the exact path, so (x - sqrt(a_t) MEAN) / sqrt(1 - a_t) must be the
    noise the walk began with. One grid step off (the fault of the original ESD code) is far outside the tolerance."""
    model, size = built(name, scheduler), 24
    cond = model.encode(["strawberry"] * size)
    state = oracle(model).visit(cond, rng=seeded(3), guidance_scale=3.0, steps=steps)
    timestep = state.t.double() * 1000
    timestep = torch.where((timestep - timestep.round()).abs() < 1e-3, timestep.round(), timestep)
    assert len(timestep.unique()) > 5
    sampler = model._started(steps)
    began = torch.randn(size, *model.latent, generator=seeded(3)).double() * sampler.init_noise_sigma
    began = sampler.scale_model_input(began, sampler.timesteps[0])
    first = sampler.timesteps[:1].double().expand(size)
    noise = noise_at(model, State(x=began), first)
    assert (noise_at(model, state, timestep) - noise).abs().max() < 1e-4
    inner = (timestep > 1000 // steps) & (timestep < 999)
    wrong = noise_at(model, state, timestep - 1000 // steps) - noise
    assert wrong[inner].abs().flatten(1).amax(1).min() > 1e-2


def test_variance_is_that_of_the_level():
    """The spec's own wording: over many states of one level, Var(x - sqrt(a) MEAN) = 1 - a."""
    model = built("tiny-unet-v")
    state = oracle(model).visit(model.encode(["cat"] * 256), rng=seeded(), guidance_scale=1.0, steps=10)
    for t in state.t.unique():
        a = level(model, (t.double() * 1000).round()).item()
        spread = (state.x[state.t == t] - a**0.5 * MEAN).var().item()
        if a < 1 - 1e-6:
            assert abs(spread / (1 - a) - 1) < 0.1


def test_level_between_grid_points_when_steps_do_not_divide():
    """30 trailing steps: DDIM goes from 966 to 933, while the next question is asked at 932."""
    model = built("tiny-unet-v")
    state = oracle(model).visit(model.encode(["cat"] * 200), rng=seeded(), guidance_scale=1.0, steps=30)
    timesteps = (state.t * 1000).round()
    assert 933 in timesteps and 932 not in timesteps
    third = timesteps == 933
    began = torch.randn(200, *model.latent, generator=seeded())
    noise = noise_at(model, State(x=began), torch.full((200,), 999.0))[third]
    there = State(x=state.x[third])
    exact = (noise_at(model, there, timesteps[third]) - noise).abs().max()
    asked = (noise_at(model, there, timesteps[third] - 1) - noise).abs().max()
    assert exact < 1e-5 < 1e-4 < asked


def test_stops_are_uniform_over_the_grid():
    model = built("tiny-unet")
    state = oracle(model).visit(model.encode(["cat"] * 800), rng=seeded(), guidance_scale=1.0, steps=4)
    times, counts = state.t.unique(return_counts=True)
    assert torch.allclose(times * 1000, torch.tensor([1.0, 251.0, 501.0, 751.0]))
    assert counts.min() > 150 and counts.max() < 250


def test_states_are_the_sampler_s_own(unet):
    """A visit is a prefix of the walk: finishing it by the stock scheduler gives the stock pipeline's latents."""
    model = unet
    seen = []
    cond = model.encode([PROMPTS[0]])
    spy = model.view(hooks=[Hook("unet", lambda _, inputs, output: seen.append((inputs[0][:1].clone(), inputs[1])))])
    x = model._noise(1, seeded(9)) * model._started(8).init_noise_sigma
    given = {"guidance_scale": 3.0, "num_inference_steps": 8, "latents": x / model._started(8).init_noise_sigma}
    reference = {}

    def keep(pipe, index, timestep, state):
        reference[index] = pipe.scheduler.scale_model_input(state["latents"], pipe.scheduler.timesteps[index + 1])
        return {}

    def stop_at_last_but_one(pipe, index, timestep, state):
        return keep(pipe, index, timestep, state) if index < 7 else {}

    model.pipeline([PROMPTS[0]], output_type="latent", callback_on_step_end=stop_at_last_but_one, **given)
    state = spy.visit(cond, rng=seeded(9), guidance_scale=3.0, steps=8)
    index = len(seen)
    assert index >= 1
    assert torch.equal(state.x, reference[index - 1])
    assert torch.allclose(state.t * 1000, model._started(8).timesteps[index].float())


def test_leaving_the_batch_changes_nothing(monkeypatch, model):
    cond = model.encode([*PROMPTS, *PROMPTS])
    fast = model.visit(cond, rng=seeded(2), guidance_scale=3.0, steps=10)
    monkeypatch.setattr(_denoiser, "_MEMORYLESS", ())
    slow = model.visit(cond, rng=seeded(2), guidance_scale=3.0, steps=10)
    assert torch.equal(fast.t, slow.t) and len(fast.t.unique()) > 2
    assert torch.allclose(fast.x, slow.x, atol=1e-4, rtol=1e-4)


def test_visit_is_reproducible_and_follows_the_view(model):
    cond = model.encode(PROMPTS)
    one, two = (model.visit(cond, rng=seeded(1), guidance_scale=3.0, steps=8) for _ in range(2))
    assert torch.equal(one.x, two.x) and torch.equal(one.t, two.t)
    other = model.visit(cond, rng=seeded(2), guidance_scale=3.0, steps=8)
    assert not torch.equal(one.x, other.x)
    edited = model.view(weights={path: -tensor for path, tensor in model.select("cross_kv").items()})
    student = edited.visit(cond, rng=seeded(1), guidance_scale=3.0, steps=8)
    assert torch.equal(student.t, one.t)
    moved = one.t < one.t.max()
    assert moved.any() and not torch.allclose(student.x[moved], one.x[moved], atol=1e-3)


def test_predict_batches_levels(model):
    state = model.noised(torch.randn(5, *model.latent, generator=seeded()), rng=seeded(1))
    cond = model.encode(["strawberry"])
    together = model.predict(state, cond)
    for i in range(5):
        alone = model.predict(State(x=state.x[i : i + 1], t=state.t[i : i + 1]), cond)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)
    shifted = State(x=state.x, t=state.t.flip(0))
    assert not torch.allclose(together, model.predict(shifted, cond), atol=1e-3)


def test_timesteps_survive_the_way_through_t(models):
    model = models["tiny-unet"]
    every = torch.arange(1000).float()
    assert torch.equal(model._timestep(State(x=torch.zeros(1), t=every / 1000)), every)
    with pytest.raises(InputError, match="needs its noise level"):
        model.predict(State(x=torch.zeros(1, *model.latent)), model.encode([""]))


def test_noised_and_as_eps(unet):
    """x = sqrt(a) clean + sqrt(1 - a) eps with unit eps, and as_eps turns the true prediction into that eps."""
    model = unet
    clean = 3 * torch.randn(64, *model.latent, generator=seeded())
    state = model.noised(clean, rng=seeded(5))
    timestep = (state.t * 1000).round()
    a = level(model, timestep).float()[:, None, None, None]
    inner = (a < 0.999).flatten()
    eps = (state.x - a.sqrt() * clean) / (1 - a).sqrt()
    assert abs(eps[inner].std().item() - 1) < 0.03 and abs(eps[inner].mean().item()) < 0.03
    native = a.sqrt() * eps - (1 - a).sqrt() * clean if model.scheduler.config.prediction_type != "epsilon" else eps
    assert torch.allclose(model.as_eps(state, native), eps, atol=1e-4)
    low = (a > 0.01).flatten()  # where eps is all there is of x, a clean sample cannot be had from it
    assert torch.allclose(model.as_clean(state, native)[low], clean[low], atol=1e-3)
    assert timestep.min() < 200 and timestep.max() > 800


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [-1.0, 3.0, 7.5])
def test_guidance_commutes_with_the_parameterization(name, scale):
    """Guiding native predictions, then converting, equals converting, then guiding: to 1e-6 (float64 network)."""
    model = load(name, dtype=torch.float64)
    state = model.noised(torch.randn(6, *model.latent, dtype=torch.float64, generator=seeded()), rng=seeded(4))
    u, c = model.predict(state, model.encode([""])), model.predict(state, model.encode(["strawberry"]))
    native = model.as_eps(state, u + scale * (c - u))
    eu, ec = model.as_eps(state, u), model.as_eps(state, c)
    assert (native - (eu + scale * (ec - eu))).abs().max() < 1e-6
    assert (native - eu).abs().max() > 1e-3


def test_distance_is_mean_squared_error_per_sample(models):
    model = models["tiny-unet"]
    pred, goal = torch.randn(3, 4, 8, 8, generator=seeded()), torch.zeros(3, 4, 8, 8)
    expected = torch.stack([(row**2).mean() for row in pred])
    assert torch.allclose(model.distance(pred, goal), expected)
    assert model.distance(pred.bfloat16(), goal.bfloat16()).dtype == torch.float32


def test_absorb_undoes_decode_s_scaling(model):
    """absorb gives the posterior's mode in the latents' scale, as the stock autoencoder does."""
    images = torch.rand(2, 3, 32, 32, generator=seeded())
    vae = model.pipeline.vae
    with torch.no_grad():
        mode = vae.encode(2 * images - 1).latent_dist.mode()
        expected = (mode - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    assert torch.allclose(model.absorb(images), expected, atol=1e-6)
    assert model.absorb(images).shape == (2, *model.latent)
