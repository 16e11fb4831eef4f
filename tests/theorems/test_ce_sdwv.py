"""What must hold for our reading of CE-SDWV, and what must not."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.methods.guard.ce_sdwv import CESDWV
from expunge.models.load import load
from expunge.ops.suppress import (
    Component,
    Part,
    Sense,
    Suppressor,
    TokenCorrection,
    added,
    principal,
    row_kinds,
)
from expunge.ops.surgery import dot, orthogonal, surgical

ONE = Request.of("strawberry", anchor="cat", retain=["guitar"])
PLAIN = CESDWV(steps=0)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(centre: float = 0.0) -> Component:
    """A concept of two directions in rows of width 6, wholly suppressed at any evidence above −1."""
    parts = {kind: Part(principal(drawn(seed, 2, 6), 1.0), torch.full((6,), centre).double()) for seed, kind in KINDS}
    return Component(parts, {"tail": sensing(torch.tensor([-3.0, -2.0]).double())})


def sensing(gate: Tensor, seed: int = 9) -> Sense:
    return Sense(torch.nn.functional.normalize(drawn(seed, 6), dim=0), torch.zeros(6).double(), gate)


KINDS = ((1, "word"), (2, "tail"), (3, "pooled"))
COND = Condition(
    tokens=drawn(0, 2, 5, 6), mask=torch.ones(2, 5, dtype=torch.bool), last=torch.tensor([1, 3]), pooled=drawn(4, 2, 6)
)


def guard(part: Component, strength: float = 1.0, adaptive: bool = True) -> Suppressor:
    return Suppressor((part,), strength, adaptive, torch.zeros(5, 6).double())


def coordinates(cond: Condition, part: Component) -> Tensor:
    """What every row but the opening one, and the pooled text, holds of its basis."""
    found = [cond.tokens[mask] @ part.parts[kind].basis.T for kind, mask in row_kinds(cond).items()]
    assert cond.pooled is not None
    return torch.cat([*found, cond.pooled @ part.parts["pooled"].basis.T])


def same(one: Condition, two: Condition) -> bool:
    pooled = one.pooled is two.pooled or torch.equal(one.pooled, two.pooled)  # type: ignore[arg-type]
    return pooled and torch.equal(one.tokens, two.tokens)


def test_at_full_strength_nothing_of_the_components_is_left_and_at_half_strength_half() -> None:
    part = made()
    before = coordinates(COND, part)
    assert coordinates(guard(part).condition(COND), part).abs().max() < 1e-12
    torch.testing.assert_close(coordinates(guard(part, 0.5).condition(COND), part), before / 2)
    assert before.abs().max() > 0.5
    moved = made(0.7)  # with a centre the coordinates end at the centre's
    held = coordinates(guard(moved).condition(COND), moved)
    assert held.abs().max() > 0.1
    again = guard(moved).condition(replace(COND, tokens=drawn(7, 2, 5, 6), pooled=drawn(8, 2, 6)))
    torch.testing.assert_close(coordinates(again, moved), held)


def test_strength_zero_is_the_identity_bit_for_bit() -> None:
    shifted = replace(guard(made(), 0.0), correction=drawn(5, 5, 6))
    assert same(shifted.condition(COND), COND)
    assert not same(replace(shifted, strength=0.1).condition(COND), COND)


def test_rows_orthogonal_to_the_basis_stay_and_others_move() -> None:
    part = made()
    clean = guard(part).condition(COND)
    again = guard(part).condition(clean)
    torch.testing.assert_close(again.tokens, clean.tokens, rtol=0, atol=1e-12)  # idempotent, too
    assert (clean.tokens - COND.tokens).norm() > 0.5
    half = guard(part, 0.5).condition(guard(part, 0.5).condition(COND))
    assert (half.tokens - guard(part, 0.5).condition(COND).tokens).norm() > 0.1


def test_another_basis_of_the_same_span_is_the_same_eraser() -> None:
    part = made(0.3)
    turn, _ = torch.linalg.qr(drawn(6, 2, 2))
    turned = {kind: replace(own, basis=turn @ own.basis) for kind, own in part.parts.items()}
    got = guard(replace(part, parts=turned)).condition(COND)
    torch.testing.assert_close(got.tokens, guard(part).condition(COND).tokens)
    skew = {kind: replace(own, basis=own.basis.flip(1)) for kind, own in part.parts.items()}
    assert (guard(replace(part, parts=skew)).condition(COND).tokens - got.tokens).norm() > 0.1


def test_the_opening_row_never_moves_whatever_is_added() -> None:
    full = replace(guard(made(0.4), 1.0, adaptive=False), correction=drawn(5, 5, 6))
    got = full.condition(COND)
    assert torch.equal(got.tokens[:, 0], COND.tokens[:, 0])
    assert ((got.tokens - COND.tokens)[:, 1:].norm(dim=-1) > 1e-3).all()


def test_the_gate_opens_between_its_two_bounds() -> None:
    part = made()
    seen = part.senses["tail"].evidence(COND, "tail")
    low, high = float(seen.min()), float(seen.max())
    assert high - low > 0.05
    ramp = replace(part, senses={"tail": sensing(torch.tensor([low, high]).double())})
    torch.testing.assert_close(ramp.alpha(COND), ((seen - low) / (high - low)))
    spared = int(seen.argmin())
    got = guard(ramp).condition(COND)
    assert torch.equal(got.tokens[spared], COND.tokens[spared])
    assert not torch.equal(got.tokens[1 - spared], COND.tokens[1 - spared])
    always = guard(ramp, adaptive=False).condition(COND)
    assert not torch.equal(always.tokens[spared], COND.tokens[spared])
    far = replace(COND, tokens=3 * COND.tokens)  # an angle: longer rows are no more evidence
    torch.testing.assert_close(part.senses["tail"].evidence(far, "tail"), seen)


def test_what_one_kind_of_row_shows_is_enough() -> None:
    never = sensing(torch.tensor([1.5, 2.0]).double(), seed=5)
    words = never.evidence(COND, "word")
    half = sensing(torch.stack([words.min(), words.max()]), seed=5)
    either = replace(made(), senses={"word": half, "tail": never})
    torch.testing.assert_close(either.alpha(COND), ((words - words.min()) / (words.max() - words.min())))
    assert float(either.alpha(COND).max()) == 1
    assert not replace(made(), senses={"tail": never}).alpha(COND).any()
    none = replace(COND, last=torch.tensor([0, 3]))  # a prompt without words has no evidence in words
    assert float(half.evidence(none, "word")[0]) == -1


def test_components_are_the_fewest_that_hold_the_energy() -> None:
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())
    for energy, count in ((0.6, 1), (0.7, 2), (13 / 14, 2), (0.95, 3), (1.0, 3)):
        basis = principal(rows, energy)
        assert len(basis) == count
        torch.testing.assert_close(basis @ basis.T, torch.eye(count, dtype=torch.float64))
    for energy in (0.0, 1.1):
        with pytest.raises(InputError, match=f"energy is {energy}"):
            principal(rows, energy)


def test_the_projected_gradient_is_orthogonal_to_the_preserving_one() -> None:
    wish, held = (drawn(1, 5), drawn(2, 3)), (drawn(3, 5), drawn(4, 3))
    got = orthogonal(wish, held)
    assert abs(float(dot(got, held))) < 1e-12 and abs(float(dot(wish, held))) > 1e-2
    assert float(dot(got, wish)) > 0  # still downhill for the wish
    nothing = tuple(0 * v for v in held)
    assert all(torch.equal(a, b) for a, b in zip(orthogonal(wish, nothing), wish, strict=True))


def test_the_loss_has_the_sums_value_and_the_projected_gradient() -> None:
    d, a, b = drawn(1, 6).requires_grad_(), drawn(2, 6), drawn(3, 6)
    wish, held = (d - a).square().sum(), (d - b).square().sum()
    u, v = (torch.autograd.grad(loss, d, retain_graph=True)[0] for loss in (wish, held))
    whole = surgical(wish, held, [d], 0.3, project=orthogonal)
    torch.testing.assert_close(whole, wish + 0.3 * held)
    got = torch.autograd.grad(whole, d)[0]
    torch.testing.assert_close(got @ v, 0.3 * v @ v)
    assert (got - (u + 0.3 * v)).norm() > 0.1


def test_only_the_correction_learns_and_it_brings_the_prediction_nearer_the_anchor() -> None:
    model = load("tiny-unet")
    learner = TokenCorrection(model, model.encode([""]))
    assert learner.weights() == {} and [p.shape for p in learner.parameters] == [model.encode([""]).tokens.shape[1:]]
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    method = CESDWV(steps=30, walk=4, pool=6, batch=2, energy=0.5, retain_weight=0.0)
    fitted = method.erase(model, ONE, Run()).guard
    assert all(torch.equal(before[name], tensor) for name, tensor in model.network.state_dict().items())
    state = model.visit(model.encode(["strawberry"] * 6), rng=Run().rng("seen"), guidance_scale=4.0, steps=4)
    goal = model.predict(state, model.encode(["cat"]))

    def miss(cond: Condition) -> float:
        return float(model.distance(model.predict(state, cond), goal).mean())

    with torch.no_grad():
        bare = miss(replace(fitted, correction=0 * fitted.correction).condition(model.encode(["strawberry"])))
        assert miss(fitted.condition(model.encode(["strawberry"]))) < bare
    assert fitted.correction.norm() > 0


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-unet-v", "tiny-sdxl"])
def test_the_target_is_suppressed_and_what_the_gate_spares_comes_back_bit_for_bit(name: str) -> None:
    model = load(name)
    found = replace(PLAIN, templates=("{}",)).erase(model, ONE, Run()).guard
    here, there = model.encode(["strawberry"]), model.encode(["guitar", "", "dog", "house", "zebra", "cat"])
    got = found.condition(here)
    assert not torch.equal(got.tokens, here.tokens)
    assert (here.pooled is None) or not torch.equal(got.pooled, here.pooled)
    spared = found.components[0].alpha(there) == 0
    assert bool(spared.any())
    assert torch.equal(found.condition(there).tokens[spared], there.tokens[spared])
    blind = replace(PLAIN, templates=("{}",), gate="always").erase(model, ONE, Run()).guard
    assert not torch.equal(blind.condition(there).tokens[spared], there.tokens[spared])


def test_more_words_widen_the_vocabulary_and_goals_differ() -> None:
    model = load("tiny-unet")

    def ranks(method: CESDWV) -> int:
        return len(method.erase(model, ONE, Run()).guard.components[0].parts["tail"].basis)

    assert ranks(replace(PLAIN, words=("red berry", "shortcake fruit"), energy=0.99)) > ranks(
        replace(PLAIN, templates=("{}",), energy=0.99)
    )
    zero = replace(PLAIN, goal="zero", gate="always", energy=1.0).erase(model, ONE, Run()).guard
    part = zero.components[0]
    left = zero.condition(model.encode(["strawberry"]))
    for kind, mask in row_kinds(left).items():
        assert (left.tokens[mask].double() @ part.parts[kind].basis.T).abs().max() < 1e-4
    two = Request(target=(Concept.of("bird"), Concept.of("cup")), anchor=(None, Concept.of("dog")))
    assert len(PLAIN.erase(model, two, Run()).guard.components) == 2


def test_every_word_of_a_guard_comes_back_from_storage() -> None:
    model, method = load("tiny-sdxl"), CESDWV(steps=2, walk=2, pool=4, batch=1, strength=0.8, words=("red fruit",))
    patch = method.erase(model, ONE, Run())
    again = CESDWV.restore(patch.tensors(), json.loads(json.dumps(patch.meta())))
    assert again.tensors().keys() == patch.tensors().keys()
    cond = model.encode(["a strawberry", "guitar"])
    assert same(again.guard.condition(cond), patch.guard.condition(cond))
    assert added(cond, again.guard.correction.float(), torch.zeros(2).double()).tokens.equal(cond.tokens)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"energy": 0.0}, "energy is 0.0"),
        ({"reach": 2.0}, "reach is 2.0"),
        ({"steps": -1}, "steps is -1"),
        ({"templates": ("a photo",)}, "template is 'a photo'"),
        ({"templates": ()}, "template is ''"),
    ],
)
def test_bad_input_is_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        replace(PLAIN, **wrong).erase(load("tiny-unet"), ONE, Run())
    assert "legal" in str(caught.value) and "\n" not in str(caught.value)


def test_other_families_and_equal_texts_are_refused() -> None:
    with pytest.raises(InputError, match="legal: unet"):
        PLAIN.erase(load("tiny-flux"), ONE, Run())
    with pytest.raises(InputError, match="do not differ"):
        principal(torch.zeros(3, 4), 0.9)


def test_it_says_that_it_is_a_reconstruction() -> None:
    assert CESDWV.reconstruction and CESDWV.__doc__ is not None and CESDWV.__doc__.startswith("Reconstruction")
