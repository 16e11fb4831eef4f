"""What must hold for our reading of Differential Vector Erasure, and what must not."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator, Hook, State
from expunge.methods.guard.dve import DVE
from expunge.models.load import load

EXACT = DVE(threshold=0.0, floor=0.0)
ONE = Request.of("strawberry", anchor="cat")
TOYS = ("tiny-unet", "tiny-unet-v", "tiny-sd3", "tiny-flux", "tiny-flux-distilled")


def drawn(seed: int, size: int = 3) -> Tensor:
    return torch.randn(size, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def across(pred: Tensor, d: Tensor) -> Tensor:
    """The part of a prediction orthogonal to d."""
    return pred - (inner(pred, d) / inner(d, d))[:, None, None, None] * d


P, C, A, U = drawn(0), drawn(1), drawn(2), drawn(3)
RESIDUAL = replace(EXACT, mode="residual")
BOTH = pytest.mark.parametrize("exact", [EXACT, RESIDUAL], ids=["joint", "residual"])


def edited(method: DVE, pred: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    return pred - method.removed(pred, U, [c for c, _ in pairs], [a for _, a in pairs])


@BOTH
@pytest.mark.parametrize("local", [False, True])
def test_a_prompt_that_is_the_target_gets_the_anchors_flow(exact: DVE, local: bool) -> None:
    method = replace(exact, local=local)
    torch.testing.assert_close(edited(method, C, (C, A)), A)
    torch.testing.assert_close(edited(method, A, (C, A)), A)
    assert torch.equal(edited(method, P, (A, A)), P)  # no direction, no NaN
    part = edited(replace(method, threshold=0.25), C, (C, A))
    torch.testing.assert_close(part, A + 0.25 * (C - A))
    assert (edited(replace(method, strength=0.5), C, (C, A)) - A).norm() > 1


def test_without_an_anchor_both_readings_are_one() -> None:
    torch.testing.assert_close(edited(EXACT, P, (C, U)), edited(RESIDUAL, P, (C, U)))
    assert (edited(EXACT, P, (C, A)) - edited(RESIDUAL, P, (C, A))).norm() > 0.1


def test_default_floor_costs_a_few_parts_in_a_million() -> None:
    for mode in ("joint", "residual"):
        torch.testing.assert_close(edited(DVE(mode=mode, threshold=0.0), C, (C, A)), A, rtol=0, atol=2e-5)


def test_raw_mode_is_an_orthogonal_projection() -> None:
    raw = replace(EXACT, mode="raw", gate="identity")
    once = edited(raw, P, (C, A))
    torch.testing.assert_close(inner(once, C - A), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(edited(raw, once, (C, A)), once)
    assert (inner(P, C - A).abs() > 0.1).any()
    half = edited(replace(raw, strength=0.5), P, (C, A))
    assert (edited(replace(raw, strength=0.5), half, (C, A)) - half).norm() > 1e-3


def test_what_harmless_means_differs_by_mode() -> None:
    """joint: nothing of target and anchor; residual: orthogonal to d as seen from the anchor; raw: to d outright."""
    away = across(P - U, C - U)
    rest = across(A - U, C - U)
    other = U + across(away, rest)  # another concept: its guidance is orthogonal to the target's and the anchor's
    torch.testing.assert_close(edited(EXACT, other, (C, A)), other)
    held = (other - edited(RESIDUAL, other, (C, A))).norm() / (C - A).norm()
    assert 0.2 < held < 0.9
    plain = A + across(P, C - A)
    torch.testing.assert_close(edited(replace(RESIDUAL, gate="identity"), plain, (C, A)), plain)
    for method in (EXACT, replace(EXACT, mode="raw")):
        assert (edited(replace(method, gate="identity"), plain, (C, A)) - plain).norm() > 0.1


@BOTH
def test_gate_leaves_what_points_away_bit_identical(exact: DVE) -> None:
    away = A - 0.7 * (C - A)
    assert torch.equal(edited(exact, away, (C, A)), away)
    torch.testing.assert_close(edited(replace(exact, gate="identity"), away, (C, A)), A)
    weak = A + 0.04 * (C - A)
    assert torch.equal(edited(replace(exact, threshold=0.05), weak, (C, A)), weak)
    assert not torch.equal(edited(exact, weak, (C, A)), weak)


def test_cosine_gate_asks_for_the_angle_not_the_size() -> None:
    d = C - A
    mixed = A + d + across(P, d) * (d.norm() / across(P, d).norm())  # 45 degrees off
    for bound, acts in ((0.5, True), (0.9, False)):
        got = edited(replace(RESIDUAL, cosine=bound), mixed, (C, A))
        assert torch.equal(got, mixed) != acts
        torch.testing.assert_close(edited(replace(RESIDUAL, cosine=bound), A + 0.1 * d, (C, A)), A)


@pytest.mark.parametrize("mode", ["joint", "residual", "raw"])
@pytest.mark.parametrize("gate", ["relu", "identity"])
def test_reversed_time_and_longer_directions_name_the_same_edit(mode: str, gate: str) -> None:
    method = replace(EXACT, mode=mode, gate=gate)
    at_once = edited(method, P, (C, A))
    torch.testing.assert_close(-P - method.removed(-P, -U, [-C], [-A]), -at_once)
    far = edited(method, P, (A + 5 * (C - A), A))
    torch.testing.assert_close(far, at_once)


@pytest.mark.parametrize("mode", ["joint", "residual"])
def test_edits_are_the_same_in_noise_and_velocity_and_raw_ones_are_not(mode: str) -> None:
    """eps = x + (1 − t) v at fixed x: affine, so differences are proportional and the raw inner product is not."""
    x, t = drawn(5), 0.3

    def eps(v: Tensor) -> Tensor:
        return x + (1 - t) * v

    def gap(method: DVE) -> Tensor:
        there = eps(P) - method.removed(eps(P), eps(U), [eps(C)], [eps(A)])
        return (eps(edited(method, P, (C, A))) - there).norm()

    assert gap(DVE(mode=mode, threshold=0.1, cosine=0.01, floor=1e-3)) < 1e-9
    assert gap(replace(EXACT, mode="raw", gate="identity")) > 0.1


def test_orthogonal_targets_are_erased_as_if_one_after_the_other() -> None:
    first = C - A
    second = A + across(drawn(7), first)
    both = edited(RESIDUAL, P, (C, A), (second, A))
    torch.testing.assert_close(edited(RESIDUAL, edited(RESIDUAL, P, (C, A)), (second, A)), both)
    other = drawn(8)  # oblique: the order of single edits would matter, the joint fit has none
    for method in (EXACT, RESIDUAL):
        torch.testing.assert_close(edited(method, P, (C, A), (other, A)), edited(method, P, (other, A), (C, A)))
        torch.testing.assert_close(edited(method, other, (C, A), (other, A)), A)


@BOTH
def test_a_target_named_twice_is_not_removed_twice(exact: DVE) -> None:
    plain = replace(exact, gate="identity")
    torch.testing.assert_close(edited(plain, P, (C, A), (C, A)), edited(plain, P, (C, A)))
    torch.testing.assert_close(edited(exact, C, (C, A), (C, A)), A)
    two = P - 2 * plain.removed(P, U, [C], [A])
    assert (two - edited(plain, P, (C, A))).norm() > 0.1


def test_places_are_judged_on_their_own_if_asked() -> None:
    """The target on the left half only: the right half stays, which one coefficient for all cannot do."""
    half = A.clone()
    half[..., :2] = C[..., :2]
    torch.testing.assert_close(edited(replace(EXACT, local=True), half, (C, A)), A)
    assert (edited(EXACT, half, (C, A)) - half)[..., 2:].norm() > 0.1


def pictures(model: Generator, prompt: str = "strawberry", scale: float = 3.0) -> Tensor:
    return model.generate([prompt] * 2, seeds=[3, 4], guidance_scale=scale, steps=4)


@pytest.mark.parametrize("name", TOYS)
def test_at_full_strength_the_target_is_drawn_as_the_anchor(name: str) -> None:
    model = load(name)
    guarded = EXACT.erase(model, ONE, Run()).on(model)
    goal, before = pictures(model, "cat"), pictures(model)
    torch.testing.assert_close(pictures(guarded), goal, rtol=0, atol=2e-3)
    torch.testing.assert_close(pictures(guarded, "cat"), goal, rtol=0, atol=2e-3)
    assert (before - goal).abs().max() > 1e-2
    unnamed = EXACT.erase(model, Request.of("strawberry"), Run()).on(model)
    torch.testing.assert_close(pictures(unnamed), pictures(model, ""), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", TOYS)
def test_strength_zero_and_an_empty_window_draw_the_stock_pictures(name: str) -> None:
    model = load(name)
    for method in (DVE(strength=0.0), DVE(t_low=0.5, t_high=0.4)):
        got = pictures(method.erase(model, ONE, Run()).on(model))
        if name == "tiny-flux-distilled":  # a guard sees c with u + s (c − u) = the answer: exact up to rounding
            torch.testing.assert_close(got, pictures(model), rtol=0, atol=1e-5)
        else:
            assert torch.equal(got, pictures(model))


def asked(method: DVE, request: Request = ONE) -> list[int]:
    """Batch sizes of the transformer's calls for one image in four steps."""
    model, sizes = load("tiny-flux"), []

    def count(module: object, inputs: tuple[Tensor, ...], output: object) -> None:
        sizes.append(len(inputs[0]))

    view = method.erase(model, request, Run()).on(model).view(hooks=[Hook("transformer", count)])
    view.generate(["guitar"], seeds=[0], guidance_scale=3.0, steps=4)
    return sizes


def test_costs_one_more_call_per_step_inside_its_window() -> None:
    assert asked(DVE()) == [2, 2] * 4
    assert asked(DVE(strength=0.0)) == [2] * 4
    assert asked(DVE(t_low=0.6)) == [2, 2, 2, 2, 2, 2]  # levels 1, .75, .5, .25: the first two
    two = Request(target=(Concept.of("cat"), Concept.of("dog")), anchor=(None, None))
    assert asked(DVE(), two) == [2, 4] * 4


def test_embedded_guidance_is_asked_at_the_scale_in_use() -> None:
    """Directions of a distilled model are taken at the sampler's scale: other scales have other ones."""
    model = load("tiny-flux-distilled")
    guarded = EXACT.erase(model, ONE, Run()).on(model)
    for scale in (1.0, 3.5):
        torch.testing.assert_close(pictures(guarded, scale=scale), pictures(model, "cat", scale), rtol=0, atol=2e-3)
    assert (pictures(model, "cat", 1.0) - pictures(model, "cat", 3.5)).abs().max() > 1e-3


@pytest.mark.parametrize("name", TOYS)
def test_every_word_of_a_guard_comes_back_from_storage(name: str) -> None:
    model, method = load(name), DVE(strength=1.3, threshold=0.1, cosine=0.01, local=True, t_low=0.1)
    patch = method.erase(model, ONE, Run())
    again = DVE.restore(patch.tensors(), json.loads(json.dumps(patch.meta())))
    assert again.meta() == patch.meta() and DVE(**again.meta()["config"]) == method
    assert again.tensors().keys() == patch.tensors().keys()
    assert torch.equal(pictures(again.on(model)), pictures(patch.on(model)))


def test_raw_mode_is_refused_where_there_is_no_velocity() -> None:
    with pytest.raises(InputError, match="raw"):
        DVE(mode="raw").erase(load("tiny-unet-v"), ONE, Run())
    model = load("tiny-flux")
    assert (pictures(DVE(mode="raw").erase(model, ONE, Run()).on(model)) - pictures(model)).abs().max() > 1e-4
    guard = DVE().erase(model, ONE, Run()).guard
    with pytest.raises(InputError, match="no noise level"):
        guard.combine(model, State(x=drawn(0)), drawn(1), drawn(2), 1.0)


def test_it_says_that_it_is_a_reconstruction() -> None:
    assert DVE.reconstruction and DVE.__doc__ is not None and DVE.__doc__.startswith("Reconstruction")
