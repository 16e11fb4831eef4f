import torch

from expunge.core.generator import Guard, Hook
from expunge.core.patch import Patch
from expunge.models.load import load
from expunge.patches.guard import GuardPatch, PassGuard


class Dim(PassGuard):
    """Halve every image, and remember what it was asked to combine."""

    def __init__(self) -> None:
        self.scales = []

    def combine(self, model, state, cond, uncond, scale):
        self.scales.append(scale)
        return super().combine(model, state, cond, uncond, scale)

    def image(self, images):
        return images / 2


def picture(model, scale=2.0):
    return model.generate(["red cat"], seeds=[3], guidance_scale=scale, steps=2)


def test_the_passing_guard_is_a_guard_and_changes_nothing():
    model = load("tiny-unet")
    assert isinstance(PassGuard(), Guard)
    assert isinstance(GuardPatch(PassGuard()), Patch)
    torch.testing.assert_close(picture(GuardPatch(PassGuard()).on(model)), picture(model), rtol=1e-5, atol=1e-6)


def test_a_guard_is_asked_at_every_step_and_about_the_image():
    model, guard = load("tiny-unet"), Dim()
    before = picture(model)
    torch.testing.assert_close(picture(GuardPatch(guard).on(model)), before / 2, rtol=1e-5, atol=1e-6)
    assert guard.scales == [2.0, 2.0]
    assert torch.equal(picture(model), before)


def test_guards_stack():
    model = load("tiny-unet")
    twice = GuardPatch(Dim()).on(GuardPatch(Dim()).on(model))
    torch.testing.assert_close(picture(twice), picture(model) / 4, rtol=1e-5, atol=1e-6)


def test_hooks_live_in_the_view_only():
    model = load("tiny-unet")
    before, seen = picture(model), []
    path = next(iter(model.select("cross_kv"))).removesuffix(".weight")

    def silence(module, inputs, output):
        seen.append(1)
        return torch.zeros_like(output)

    view = GuardPatch(PassGuard(), hooks=(Hook(path, silence),)).on(model)
    assert not torch.equal(picture(view), before)
    count = len(seen)
    assert count > 0
    assert torch.equal(picture(model), before)
    assert len(seen) == count


def test_what_it_remembers_can_be_stored():
    patch = GuardPatch(PassGuard(), state={"basis": torch.eye(3).T}, facts={"strength": 2.0})
    assert patch.tensors()["basis"].is_contiguous()
    assert patch.meta() == {"strength": 2.0}
