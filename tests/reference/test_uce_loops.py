"""UCE against loops that share nothing with it, on real U-Net classes in float64: equal to 1e-10 in every layer."""

import numpy as np
import pytest
import torch
from torch import Tensor
from uce_loops import Text, edit_2023, edit_2025

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.methods.closed_form.uce import UCE
from expunge.models.tiny import tiny_pipeline
from expunge.models.unet import UNetGenerator

FILLS_THE_WINDOW = "the red cat on the blue car with a picture of a dog and a banana in a drawing of a guitar"
REQUEST = Request(
    target=(
        Concept(name="strawberry", prompts=("strawberry", "a red strawberry")),
        Concept.of("guitar"),
        Concept.of(FILLS_THE_WINDOW),
    ),
    anchor=(Concept.of("cat"), None, Concept.of("dog")),
    retain=(Concept.of("car"), Concept(name="banana", prompts=("banana", "picture of a banana", "banana"))),
)
RETAINED = ["car", "banana", "picture of a banana", "banana"]

UNETS = ("tiny-unet", "tiny-unet-v", "tiny-sdxl")


def double(name: str) -> UNetGenerator:
    return UNetGenerator(tiny_pipeline(name).to(torch.float64), name)


def text(model: UNetGenerator, prompt: str) -> Text:
    cond = model.encode([prompt])
    return Text(rows=cond.tokens[0].numpy(), last=int(cond.last[0]))


def worst(model: UNetGenerator, method: UCE, expected: dict[str, np.ndarray]) -> float:
    """Largest relative Frobenius error over layers."""
    edited = method.erase(model, REQUEST, Run()).on(model)

    def error(path: str, weight: Tensor) -> float:
        return float(np.linalg.norm(weight.numpy() - expected[path]) / np.linalg.norm(expected[path]))

    return max(error(site.path, site.weight) for site in edited.sites("text_in"))


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("technique", ["replace", "tensor"])
def test_2023_equals_loops(name: str, technique: str) -> None:
    model = double(name)
    pairs = [(text(model, t), text(model, a)) for t, a in REQUEST.pairs]
    assert max(old.last for old, _ in pairs) == len(pairs[0][0].rows) - 2  # one prompt leaves two rows only
    kept = [text(model, prompt) for prompt in ["", *RETAINED]]
    expected = {
        site.path: edit_2023(
            site.weight.numpy(), pairs, kept, lam=0.5, erase=1.0, preserve=1 / len(kept), technique=technique
        )
        for site in model.sites("text_in")
    }
    assert worst(model, UCE(technique=technique, ridge=0.5), expected) < 1e-10
    assert worst(model, UCE(technique=technique, ridge=0.51), expected) > 1e-8


@pytest.mark.parametrize("name", UNETS)
def test_2025_equals_loops(name: str) -> None:
    model = double(name)
    pairs = [(text(model, t), text(model, a)) for t, a in REQUEST.pairs]
    kept = [text(model, prompt) for prompt in RETAINED]
    expected = {
        site.path: edit_2025(site.weight.numpy(), pairs, kept, lam=0.5, erase=1.0, preserve=1.0)
        for site in model.sites("text_in")
    }
    assert worst(model, UCE(mode="uce2025", ridge=0.5), expected) < 1e-10
    assert worst(model, UCE(mode="uce2025", ridge=0.51), expected) > 1e-8
