"""Edits of the embedded model that follow one another: its weights to 1e-10 in float64, its pictures to rounding."""

import pytest
import torch

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.methods.closed_form.uce import UCE
from expunge.models.load import load
from expunge.models.unet import UNetGenerator
from expunge.patches.shared import SharedPatch


def request(*pairs: tuple[str, str]) -> Request:
    return Request(
        target=tuple(Concept.of(target) for target, _ in pairs),
        anchor=tuple(Concept.of(anchor) for _, anchor in pairs),
        retain=(Concept.of("cherries"),),
    )


@pytest.mark.slow
def test_composed_and_undone_edits_are_those_solved_at_once_and_alone() -> None:
    model = UNetGenerator(load("emoji-unet").pipeline.to(torch.float64), "emoji-unet")
    berry, fruit = ("strawberry", "apple"), ("banana", "lemon")
    a, b, joint = (UCE().erase(model, request(*pairs), Run()) for pairs in ([berry], [fruit], [berry, fruit]))
    both = SharedPatch((*a.parts, *b.parts), a.sites)
    undone = SharedPatch(both.parts[1:], both.sites)
    views = [patch.on(model) for patch in (both, joint, undone, b)]
    for path in a.sites:
        old, (got, whole, left, alone) = model.weight(path), [view.weight(path) for view in views]
        assert (got - whole).norm() <= 1e-10 * (whole - old).norm()
        assert torch.equal(left, alone)
        assert (got - alone).norm() > 1e-2 * (whole - old).norm()
    asked = {"seeds": [3, 4], "guidance_scale": 4.0, "steps": 3}
    prompts = ["a flat picture of a strawberry", "a flat picture of a banana"]
    got, whole, base = (seen.generate(prompts, **asked) for seen in (views[0], views[1], model))
    assert (got - whole).abs().max() < 1e-5
    assert ((got - base).abs().amax((1, 2, 3)) > 0.02).all()
