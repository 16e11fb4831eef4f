"""ANT's time direction on drawn pictures: reversing early states costs the pictures their structure."""

import pytest
import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.eraser import Run
from expunge.core.generator import Generator
from expunge.core.records import Case
from expunge.core.registry import find
from expunge.methods.finetune.ant import ANT
from expunge.models.load import load
from expunge.suites.load import load as load_suite

SUITE = load_suite("objects")
CASES = {
    role: [case for case in SUITE.cases_for("strawberry") if case.role == role][::3] for role in ("target", "retain")
}
SHORT = {"steps": 100, "pool": 48, "walk": 25, "maps": 0, "batch": 4, "lr": 4e-5}


def drawn(model: Generator, role: str) -> Tensor:
    """Ten pictures of the target, or twelve of its neighbours."""
    cases: list[Case] = CASES[role][:12]
    with torch.no_grad():
        return model.generate(
            [case.prompt for case in cases], seeds=[case.seed for case in cases], guidance_scale=4.0, steps=25
        )


@pytest.mark.slow
def test_the_mirrored_direction_erases_no_better_and_moves_every_picture_further() -> None:
    """Strawberry, where both directions erase alike at these settings; distances to the base under equal seeds."""
    base, judge = load("emoji-unet"), find("detectors", "judge_vit")()
    aim, plain = SUITE.target("strawberry"), {role: drawn(load("emoji-unet"), role) for role in CASES}
    told = []
    for reverse_time in (False, True):
        method = ANT(**SHORT, reverse_time=reverse_time)
        erased = method.erase(base, Request(target=(aim.concept,), anchor=(None,)), Run()).on(base)
        images = {role: drawn(erased, role) for role in CASES}
        rate = float(judge.fires(images["target"], aim.concept).float().mean())
        seen = {
            role: 1 - torch.cosine_similarity(judge.features(images[role]), judge.features(plain[role])).mean()
            for role in CASES
        }
        pixels = {role: (images[role] - plain[role]).square().mean() for role in CASES}
        told.append((rate, seen, pixels))
    (rate, seen, pixels), (rate_mirrored, seen_mirrored, pixels_mirrored) = told
    assert rate <= 0.4 < judge.fires(plain["target"], aim.concept).float().mean()
    assert rate_mirrored >= rate
    assert seen_mirrored["target"] > 1.4 * seen["target"] and pixels_mirrored["target"] > 1.5 * pixels["target"]
    assert seen_mirrored["retain"] > 1.1 * seen["retain"] and pixels_mirrored["retain"] > 1.1 * pixels["retain"]
