"""Toy models, built once per session; every test may rely on no other test having changed them (`digest` proves it)."""

import hashlib

import pytest
import torch

from expunge.models.load import load
from expunge.models.unet import UNetGenerator

NAMES = ("tiny-unet", "tiny-unet-v", "tiny-sdxl")
PROMPTS = ("a photo of a strawberry", "a cat in the style of a guitar", "red car")


def digest(model: UNetGenerator) -> str:
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
def models() -> dict[str, UNetGenerator]:
    loaded = {name: load(name) for name in NAMES}
    for model in loaded.values():
        model.encode(["cat"])  # transformers installs its own output-recording hooks on first use, for good
    return loaded


@pytest.fixture(params=NAMES)
def model(request, models):
    """One toy model after the other, checked to be untouched when the test ends."""
    chosen = models[request.param]
    before = digest(chosen)
    yield chosen
    assert digest(chosen) == before
