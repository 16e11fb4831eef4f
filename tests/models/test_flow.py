"""The flow family: states on the sampler's path, both kinds of guidance, both routes of the text, exact site lists."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from expunge.core.condition import GUIDANCE
from expunge.core.errors import InputError
from expunge.core.generator import Hook, State
from expunge.models._mmdit_groups import mmdit_paths, site_roles
from expunge.models.mmdit import MMDiTGenerator, pack, unpack
from expunge.models.tiny import tiny_pipeline

from .conftest import FLOWS, PROMPTS, seeded

MEAN = 1.5  # the synthetic data set: one latent, all its values MEAN
POOLED = "transformer.time_text_embed.text_embedder.linear_1.weight"
CONTEXT = "transformer.context_embedder.weight"


def oracle(model):
    """The view whose network is the exact velocity of that data set: v = eps - x0 = (x - MEAN) / t."""

    def run(module, inputs, output):
        x, time = (inputs[0], inputs[3] * (1 if model.flux else 1e-3))
        return (((x.double() - MEAN) / time.double().view(-1, *[1] * (x.ndim - 1))).to(x.dtype),)

    return model.view(hooks=[Hook("transformer", run)])


@pytest.mark.parametrize("steps", [20, 7])
def test_x_has_exactly_the_noise_level_of_t(flow, steps):
    """On point data (x - (1 - t) MEAN) / t stays the noise the walk began with; one grid step off is far outside."""
    size = 24
    state = oracle(flow).visit(flow.encode(["cat"] * size), rng=seeded(3), guidance_scale=3.0, steps=steps)
    began = torch.randn(size, *flow.latent, generator=seeded(3)).double()
    grid = flow._started(steps).sigmas.double()
    t = state.t.double()[:, None, None, None]
    assert len(t.unique()) > 3 and state.t.max() == 1
    assert (((state.x.double() - (1 - t) * MEAN) / t) - began).abs().max() < 1e-4
    later = torch.stack([grid[(grid - one).abs().argmin() + 1] for one in state.t.double()])[:, None, None, None]
    inner = (later > 0).flatten()
    wrong = ((state.x.double() - (1 - later) * MEAN) / later - began)[inner]
    assert wrong.abs().flatten(1).amax(1).min() > 1e-2


def walked(view, steps):
    """Noise, and where the view's sampler takes it, guided."""
    cond, uncond, scheduler = view.encode(["cat", "dog"]), view.encode(["", ""]), view._started(steps)
    x = noise = view._noise(2, seeded(4))
    for timestep in scheduler.timesteps:
        x = view._advance(scheduler, x, timestep, cond, uncond, 3.0, seeded())
    return noise, x


@pytest.mark.parametrize("steps", [1, 7, 28])
def test_a_walk_goes_the_whole_way(flow, steps):
    """Σ (sigma_{i+1} − sigma_i) = −1: a velocity of 1 takes every value down by 1, in any number of steps."""
    sigmas = flow._started(steps).sigmas.double()
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all() and len(sigmas) == steps + 1
    assert float(sigmas.diff().sum()) == pytest.approx(-1, abs=1e-9)
    one = flow.view(hooks=[Hook("transformer", lambda module, inputs, output: (torch.ones_like(output[0]),))])
    noise, x = walked(one, steps)
    torch.testing.assert_close(x - noise, -torch.ones_like(x), rtol=0, atol=1e-5)


def test_times_without_sigmas_go_nowhere(flow):
    """The fault of EraseAnything's code: 28 timesteps put beside the scheduler's first 1000 sigmas."""
    scheduler = copy.deepcopy(flow.scheduler)
    scheduler.timesteps, x = torch.linspace(999, 1, 28), torch.zeros(1)
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        x = scheduler.step(torch.ones(1), timestep, x, return_dict=False)[0]
    assert -0.03 < x < -0.005


@pytest.mark.parametrize("steps", [1, 7])
def test_an_exact_velocity_lands_on_the_clean_latent(flow, steps):
    """One step of it is enough; what the toy itself says leads elsewhere."""
    _, x = walked(oracle(flow), steps)
    assert (x - MEAN).abs().max() < 1e-4
    assert (walked(flow, steps)[1] - MEAN).abs().max() > 1


def test_the_shift_for_resolution(models, monkeypatch):
    """e^mu / (e^mu + 1 / sigma − 1): monotone in sigma and mu, 0 and 1 stay, mu = 0 changes nothing."""
    model = models["tiny-flux-distilled"]

    def grid(mu, steps=20):
        monkeypatch.setattr(type(model), "_mu", lambda self: mu)
        return model._started(steps).sigmas.double()

    plain = torch.linspace(1, 0, 21).double()
    torch.testing.assert_close(grid(0.0), plain, rtol=0, atol=1e-6)
    shifted = [grid(mu) for mu in (-0.5, 0.0, 0.5, 1.15)]
    for one, more in pairwise(shifted):
        assert (one.diff() < 0).all() and (one[1:-1] < more[1:-1]).all()
        assert one[0] == more[0] == 1 and one[-1] == more[-1] == 0
    inner, e = plain[1:-1], torch.tensor(1.15).double().exp()
    torch.testing.assert_close(shifted[-1][1:-1], e / (e + 1 / inner - 1), rtol=0, atol=1e-6)
    monkeypatch.undo()
    for tokens, mu in ((256, 0.5), (1024, 0.63), (4096, 1.15)):  # 256, 512 and 1024 pixels of FLUX
        monkeypatch.setattr(model, "tokens_per_image", tokens)
        assert model._mu() == pytest.approx(mu, abs=1e-9)


def test_guidance_commutes_with_the_change_to_noise(flow):
    """Edited as noise or as velocity, it is one model: as_eps of the guided is the guided of as_eps."""
    state, scale = flow.noised(torch.randn(4, *flow.latent, generator=seeded()), rng=seeded(1)), -1.0
    u, c = (flow.predict(state, flow.encode([text])) for text in ("", "strawberry"))
    eu, ec = flow.as_eps(state, u), flow.as_eps(state, c)
    torch.testing.assert_close(flow.as_eps(state, u + scale * (c - u)), eu + scale * (ec - eu), rtol=1e-4, atol=1e-5)
    assert (ec - eu).norm() > 1e-3 * ec.norm()


def test_states_are_the_sampler_s_own(flow):
    """Finishing a visit with the sampler's remaining steps gives the latents of the stock pipeline."""
    cond, steps = flow.encode([PROMPTS[0]]), 6
    state = flow.visit(cond, rng=seeded(9), guidance_scale=3.0, steps=steps)
    whole, rest = flow._started(steps), flow._started(steps)
    begin = int((whole.timesteps / 1000 - state.t).abs().argmin())
    assert 0 < begin < steps
    x, uncond = flow._noise(1, seeded(9)), flow.encode([""])
    for index, timestep in enumerate(whole.timesteps):
        if index == begin:
            assert torch.equal(x, state.x)
        x = flow._advance(whole, x, timestep, cond, uncond, 3.0, seeded())
    y = state.x
    for timestep in rest.timesteps[begin:]:
        y = flow._advance(rest, y, timestep, cond, uncond, 3.0, seeded())
    assert torch.equal(x, y)


def test_stops_are_uniform_over_the_shifted_grid(flow):
    state = oracle(flow).visit(flow.encode(["cat"] * 800), rng=seeded(), guidance_scale=1.0, steps=4)
    times, counts = state.t.unique(return_counts=True)
    assert torch.allclose(times.flip(0), flow._started(4).sigmas[:4])
    assert counts.min() > 150 and counts.max() < 250


def test_velocity_noise_and_clean_latents_convert(flow):
    """x = (1 - t) x0 + t eps; as_eps of eps - x0 is eps, at levels all over the shifted grid."""
    clean = 3 * torch.randn(64, *flow.latent, generator=seeded())
    state = flow.noised(clean, rng=seeded(5))
    t = state.t[:, None, None, None]
    eps = (state.x - (1 - t) * clean) / t
    far = state.t > 0.05
    assert abs(eps[far].std().item() - 1) < 0.03 and abs(eps[far].mean().item()) < 0.03
    assert torch.allclose(flow.as_eps(state, eps - clean)[far], eps[far], atol=1e-3)
    assert torch.allclose(flow.as_clean(state, eps - clean)[far], clean[far], atol=1e-3)
    assert 0 < state.t.min() < 0.2 and state.t.max() > 0.8 and state.t.max() <= 1


def test_the_grid_is_the_pipelines(models):
    """Unshifted for schnell, shift 3 for SD3, by the number of image tokens for dev; it always begins at pure noise."""
    flux, dev = (models[name]._started(5).sigmas for name in ("tiny-flux", "tiny-flux-distilled"))
    assert torch.allclose(flux, torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]))
    mu = calculate_shift(models["tiny-flux-distilled"].tokens_per_image)
    assert models["tiny-flux-distilled"]._mu() == pytest.approx(mu, rel=1e-12)
    expected = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]).double()
    shifted = torch.exp(torch.tensor(mu)) / (torch.exp(torch.tensor(mu)) + 1 / expected - 1)
    assert torch.allclose(dev[:5].double(), shifted, atol=1e-6)
    sd3 = models["tiny-sd3"]._started(5).sigmas
    assert sd3[0] == 1 and torch.all(sd3[1:4] > flux[1:4])


def test_packing(models):
    x = torch.randn(2, 4, 8, 6, generator=seeded())
    packed = pack(x)
    assert packed.shape == (2, 12, 16) and torch.equal(unpack(packed, 8, 6), x)
    stock = models["tiny-flux"].pipeline._pack_latents(x, 2, 4, 8, 6)
    assert torch.equal(packed, stock)
    ids = models["tiny-flux"].pipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    assert torch.equal(models["tiny-flux"]._positions(3, torch.float32)[1], ids)


def test_embedded_guidance_is_an_input(models):
    """encode asks for 1; visit and generate put their own scale there, and ask the network once per step."""
    model, calls = models["tiny-flux-distilled"], []
    cond = model.encode(["strawberry", "cat"])
    assert cond.extra[GUIDANCE].tolist() == [1, 1]
    spy = model.view(hooks=[Hook("transformer", lambda _, inputs, output: calls.append(inputs[6].clone()))])
    spy.generate(["strawberry", "cat"], seeds=[1, 2], guidance_scale=3.5, steps=4)
    assert [call.tolist() for call in calls] == [[3.5, 3.5]] * 4
    calls.clear()
    spy.visit(cond, rng=seeded(), guidance_scale=2.0, steps=8)
    assert calls and all(set(call.tolist()) == {2.0} for call in calls)
    state = model.noised(torch.randn(2, *model.latent, generator=seeded()), rng=seeded(1))
    one, more = model.predict(state, cond), model.predict(state, cond.at(3.5))
    assert torch.equal(model.predict(state, cond.at(1.0)), one) and (one - more).norm() > 0.05 * one.norm()
    plain = models["tiny-flux"].encode(["cat"])
    assert plain.extra == {} and plain.at(3.5) is plain


def test_each_route_is_heard_alone(flow):
    """Tokens and pooled text: either one alone moves the prediction, so an edit of one cannot pass for both."""
    state = flow.noised(torch.randn(4, *flow.latent, generator=seeded()), rng=seeded(1))
    one, two = flow.encode(["strawberry"]), flow.encode(["banana"])
    base = flow.predict(state, one)
    for mixed in (replace(one, tokens=two.tokens), replace(one, pooled=two.pooled)):
        assert (flow.predict(state, mixed) - base).norm() > 0.1 * base.norm()


def test_layout_of_the_tokens(models):
    """`last` is the last word of the first band; T5 closes a prompt without opening it."""
    flux = models["tiny-flux"].encode(["", "strawberry", "a photo of a cat"])
    assert flux.last.tolist() == [0, 0, 4] and flux.mask.sum(1).tolist() == [1, 2, 6] and flux.bands == ()
    sd3 = models["tiny-sd3"].encode(["", "strawberry", "a photo of a cat"])
    assert sd3.bands == ((0, 24), (24, 48)) and sd3.last.tolist() == [0, 1, 5]
    assert sd3.mask[:, :24].sum(1).tolist() == [2, 3, 7] and sd3.mask[:, 24:].sum(1).tolist() == [1, 2, 6]
    assert sd3.take(torch.tensor([1])).bands == sd3.bands
    for text, match in (("cat 北京", "do not know"), (" ", "no words")):
        with pytest.raises(InputError, match=match):
            models["tiny-flux"].check_prompt(text)


def test_sd3_without_its_t5(tmp_path):
    pipeline = tiny_pipeline("tiny-sd3")
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    from expunge.models.load import load

    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    given = {"num_inference_steps": 3, "output_type": "pt", "guidance_scale": 3.0, "generator": [seeded(1)]}
    images = model.pipeline(["strawberry"], **given).images
    assert torch.equal(model.generate(["strawberry"], seeds=[1], guidance_scale=3.0, steps=3), images)
    assert not model.encode(["cat"]).mask[:, 24:].any()


@pytest.mark.parametrize(("name", "joint", "per_attention"), [("tiny-sd3", 3, 20), ("tiny-flux", 2, 20)])
def test_exact_sites_and_groups(models, name, joint, per_attention):
    model = models[name]
    sites = model.sites("text_in")
    assert [(site.path, site.role, site.reads) for site in sites] == [
        (POOLED, "pooled", "pooled"),
        (CONTEXT, "context", "tokens"),
    ]
    assert [site.path for site in sites] == list(model.select("text_in"))
    kv = [f"transformer.transformer_blocks.{i}.attn.add_{x}_proj.weight" for i in range(joint) for x in "kv"]
    assert [site.path for site in model.sites("cross_kv")] == kv
    assert [site.role for site in model.sites("cross_kv")] == ["key", "value"] * joint
    assert set(model.select("cross_kv")) == {*kv, *(path.replace("weight", "bias") for path in kv)}
    assert model.sites("non_cross_attention") == [] and model.sites("text_encoder") == []
    assert {site.path for site in model.sites("all")} == {POOLED, CONTEXT, *kv}
    text = model.select("text_encoder")
    assert {path.partition(".")[0] for path in text} == {part for part in model.network if "text" in part}
    whole = [path for path in model.select("cross_attention") if path.startswith("transformer.transformer_blocks.0.")]
    assert len(whole) == per_attention and all(".attn." in path for path in whole)


@pytest.fixture(scope="module")
def dev():
    """FLUX.1-dev's shapes, no numbers."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


@pytest.fixture(scope="module")
def medium():
    """SD3.5-medium's shapes, no numbers."""
    with torch.device("meta"):
        return SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )


def size(transformer, paths):
    return sum(transformer.get_parameter(path.partition(".")[2]).numel() for path in paths)


def test_flux_dev_shapes(dev):
    assert size(dev, mmdit_paths(dev, "all")) == 11_901_408_320
    assert mmdit_paths(dev, "text_in") == [POOLED, CONTEXT]
    assert size(dev, mmdit_paths(dev, "text_in")) == 768 * 3072 + 4096 * 3072
    assert len(mmdit_paths(dev, "cross_kv")) == 19 * 4
    assert size(dev, mmdit_paths(dev, "cross_kv")) == 19 * 2 * (3072 * 3072 + 3072)
    cross = mmdit_paths(dev, "cross_attention")
    assert cross == mmdit_paths(dev, "attention")
    assert len({path.rpartition(".attn.")[0] for path in cross}) == 19 + 38
    assert len(site_roles(dev)) == 2 + 19 * 2


def test_sd35_medium_shapes(medium):
    assert mmdit_paths(medium, "text_in") == [POOLED, CONTEXT]
    assert size(medium, mmdit_paths(medium, "text_in")) == 2048 * 1536 + 4096 * 1536
    cross, attention = (set(mmdit_paths(medium, group)) for group in ("cross_attention", "attention"))
    assert not any(".attn2." in path for path in cross)  # the image's attention to itself, in spite of its name in SD 1
    assert len({path.rpartition(".attn2.")[0] for path in attention - cross}) == 13
    assert len(mmdit_paths(medium, "cross_kv")) == 24 * 4
    assert not set(mmdit_paths(medium, "non_cross_attention")) & cross


def test_models_it_would_misread():
    def refused(match, **config):
        pipeline = tiny_pipeline("tiny-flux")
        for part, changes in config.items():
            getattr(pipeline, part).register_to_config(**changes)
        with pytest.raises(InputError, match=match):
            MMDiTGenerator(pipeline, "x")

    refused("reads 96 channels, its autoencoder makes 4", transformer={"in_channels": 96})
    refused("invert_sigmas", scheduler={"invert_sigmas": True})
    pipeline = tiny_pipeline("tiny-flux")
    pipeline.scheduler = tiny_pipeline("tiny-unet").scheduler
    with pytest.raises(InputError, match="samples by DDIMScheduler; legal: FlowMatchEulerDiscreteScheduler"):
        MMDiTGenerator(pipeline, "x")
    pipeline = tiny_pipeline("tiny-flux")
    pipeline.transformer = tiny_pipeline("tiny-unet").unet
    with pytest.raises(InputError, match="is a UNet2DConditionModel; legal: FluxTransformer2DModel"):
        MMDiTGenerator(pipeline, "x")


@pytest.mark.parametrize("name", FLOWS)
def test_a_state_needs_its_level(models, name):
    with pytest.raises(InputError, match="needs its noise level"):
        models[name].predict(State(x=torch.zeros(1, *models[name].latent)), models[name].encode([""]))
