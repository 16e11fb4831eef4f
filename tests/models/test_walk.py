"""Our walk draws the stock pipelines' images. On this CPU bit for bit, in fp32, bf16 and fp16; asserted at 0.

Flow models under true guidance differ by rounding: FLUX' pipeline asks the network twice, we once for both;
SD3's encodes the empty prompt once per image, we once.
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from expunge.core.errors import InputError
from expunge.models.load import load
from expunge.models.tiny import tiny_pipeline
from expunge.models.unet import UNetGenerator

from .conftest import PROMPTS, UNETS, seeded, stock

SCHEDULERS = (
    PNDMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)
BATCH_TOLERANCE = 1e-5  # of a pixel in [0, 1]: batched matrix products round differently


def tolerance(model, scale):
    return BATCH_TOLERANCE if model.name in ("tiny-sd3", "tiny-flux") and scale != 1 else 0.0


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
def test_images_equal_the_stock_pipeline(model, scale):
    seeds = [11, 12, 10**12]
    ours = model.generate(PROMPTS, seeds=seeds, guidance_scale=scale, steps=8)
    assert ours.dtype == torch.float32 and ours.min() >= 0 and ours.max() <= 1
    assert (ours - stock(model, PROMPTS, seeds, scale, 8)).abs().max() <= tolerance(model, scale)
    other = stock(model, PROMPTS, seeds, scale + 0.1 if scale > 1 else 1.5, 8)
    assert (ours - other).abs().max() > max(1e-4, tolerance(model, scale))


def test_negative_prompts_equal_the_stock_pipeline(model):
    negative, given = ["blue", "a dog", "banana"], {"seeds": [1, 2, 3], "guidance_scale": 4.0, "steps": 6}
    if model.family == "mmdit" and model.distilled:
        with pytest.raises(InputError, match="guidance-distilled and has no unconditional pass"):
            model.generate(PROMPTS, negative=negative, **given)
        return
    ours = model.generate(PROMPTS, negative=negative, **given)
    assert (ours - stock(model, PROMPTS, [1, 2, 3], 4.0, 6, negative=negative)).abs().max() <= tolerance(model, 4.0)
    assert (ours - model.generate(PROMPTS, **given)).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", UNETS)
def test_other_schedulers_equal_the_stock_pipeline(name, scheduler):
    pipeline = tiny_pipeline(name)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    model = UNetGenerator(pipeline, name)
    ours = model.generate(PROMPTS, seeds=[1, 2, 3], guidance_scale=3.0, steps=7)
    assert torch.equal(ours, stock(model, PROMPTS, [1, 2, 3], 3.0, 7))
    assert torch.equal(ours, model.generate(PROMPTS, seeds=[1, 2, 3], guidance_scale=3.0, steps=7))


def test_time_grids_equal_the_stock_pipeline():
    for spacing in ("leading", "linspace", "trailing"):
        pipeline = tiny_pipeline("tiny-unet-v")
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
        model = UNetGenerator(pipeline, "x")
        ours = model.generate(PROMPTS[:1], seeds=[4], guidance_scale=2.0, steps=30)
        assert torch.equal(ours, stock(model, PROMPTS[:1], [4], 2.0, 30))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["tiny-unet-v", "tiny-sdxl", "tiny-sd3", "tiny-flux-distilled"])
@pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning")
def test_half_precision_equals_the_stock_pipeline(name, dtype):
    model = load(name, dtype=dtype)
    ours = model.generate(PROMPTS, seeds=[1, 2, 3], guidance_scale=4.0, steps=5)
    assert torch.equal(ours, stock(model, PROMPTS, [1, 2, 3], 4.0, 5))


def test_batch_changes_an_image_by_rounding_only(model):
    together = model.generate(PROMPTS, seeds=[7, 8, 9], guidance_scale=5.0, steps=10)
    alone = [model.generate([text], seeds=[7 + i], guidance_scale=5.0, steps=10) for i, text in enumerate(PROMPTS)]
    assert (together - torch.cat(alone)).abs().max() < BATCH_TOLERANCE
    turned = model.generate(PROMPTS[::-1], seeds=[9, 8, 7], guidance_scale=5.0, steps=10).flip(0)
    assert (together - turned).abs().max() < BATCH_TOLERANCE
    assert (together[0] - together[1]).abs().max() > 1000 * BATCH_TOLERANCE


def test_guidance_zero_is_the_empty_prompt(models):
    model = models["tiny-unet"]
    none = model.generate(["strawberry"], seeds=[1], guidance_scale=0.0, steps=5)
    assert torch.allclose(none, model.generate([""], seeds=[1], guidance_scale=1.0, steps=5), atol=BATCH_TOLERANCE)


def test_sdxl_empty_prompt_is_the_pipelines(models):
    model = models["tiny-sdxl"]
    cond = model.encode(["strawberry", ""])
    assert cond.tokens[1].abs().max() == 0 and cond.pooled[1].abs().max() == 0
    assert cond.tokens[0].abs().max() > 0
    assert cond.tokens.shape[-1] == 64 and set(cond.extra) == {"time_ids"}


def test_bad_requests(models):
    model = models["tiny-unet"]
    with pytest.raises(InputError, match="1 seeds for 2 prompts"):
        model.generate(["a", "b"], seeds=[1], guidance_scale=1.0, steps=5)
    with pytest.raises(InputError, match="1 negative prompts for 2 prompts"):
        model.generate(["a", "b"], seeds=[1, 2], guidance_scale=1.0, steps=5, negative=[""])
    with pytest.raises(InputError, match=r"0 sampler steps; legal: 1 to 1000"):
        model.generate(["a"], seeds=[1], guidance_scale=1.0, steps=0)
    with pytest.raises(InputError, match="no prompts"):
        model.generate([], seeds=[], guidance_scale=1.0, steps=5)
    state = model.noised(torch.zeros(3, *model.latent), rng=seeded())
    with pytest.raises(InputError, match="2 prompts for 3 states"):
        model.predict(state, model.encode(["a", "b"]))


def test_check_prompt(models):
    for model in models.values():
        model.check_prompt("a photo of a strawberry")
        for text in ("", "  \n "):
            with pytest.raises(InputError, match="no words"):
                model.check_prompt(text)
        with pytest.raises(InputError, match=r"do(es)? not know"):
            model.check_prompt("cat <|endoftext|> dog")
        room = 23 if model.family == "mmdit" else 22  # T5 closes a prompt, CLIP opens it too
        model.check_prompt("cat " * room)
        with pytest.raises(InputError, match=rf"has {room + 1} tokens; .* at most {room}"):
            model.check_prompt("cat " * (room + 1))
