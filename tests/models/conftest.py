"""Toy models, built once per session; every test may rely on no other test having changed them (`digest` proves it)."""

import hashlib

import pytest
import torch

from expunge.models.load import load
from expunge.models.mmdit import MMDiTGenerator
from expunge.models.unet import UNetGenerator

Toy = UNetGenerator | MMDiTGenerator

UNETS = ("tiny-unet", "tiny-unet-v", "tiny-sdxl")
FLOWS = ("tiny-sd3", "tiny-flux", "tiny-flux-distilled")
NAMES = (*UNETS, *FLOWS)
PROMPTS = ("a photo of a strawberry", "a cat in the style of a guitar", "red car")


def digest(model: Toy) -> str:
    """sha256 over every parameter and buffer of the network, and over its hook registries."""
    total = hashlib.sha256()
    for name, tensor in [*model.network.named_parameters(), *model.network.named_buffers()]:
        total.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    for name, module in model.network.named_modules():
        total.update(f"{name} {len(module._forward_hooks)} {len(module._forward_pre_hooks)} {module.training}".encode())
    return total.hexdigest()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@pytest.fixture(scope="session")
def models() -> dict[str, Toy]:
    loaded = {name: load(name) for name in NAMES}
    for model in loaded.values():
        model.encode(["cat"])  # transformers installs its own output-recording hooks on first use, for good
    return loaded


def stock(model, prompts, seeds, scale, steps, *, negative=None):
    """What the stock pipeline draws, asked for what `generate` was asked for."""
    given = {"num_inference_steps": steps, "generator": [seeded(seed) for seed in seeds], "output_type": "pt"}
    if model.family == "mmdit":
        given["max_sequence_length"] = model._window("_2" if model.flux else "_3")
    if model.name.startswith("tiny-flux"):
        given["height"] = given["width"] = model.latent[1] * model.pipeline.vae_scale_factor
    if model.name == "tiny-flux":
        given["true_cfg_scale"], negative = scale, negative or [""] * len(prompts)
    else:
        given["guidance_scale"] = scale
    if negative:
        given["negative_prompt"] = negative
    return model.pipeline(list(prompts), **given).images.float()


def watched(chosen):
    """A toy model, checked to be untouched when the test ends."""
    before = digest(chosen)
    yield chosen
    assert digest(chosen) == before


@pytest.fixture(params=NAMES)
def model(request, models):
    """One toy model after the other."""
    yield from watched(models[request.param])


@pytest.fixture(params=UNETS)
def unet(request, models):
    """The toy models that diffuse."""
    yield from watched(models[request.param])


@pytest.fixture(params=FLOWS)
def flow(request, models):
    """The toy models that flow."""
    yield from watched(models[request.param])
