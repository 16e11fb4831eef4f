"""What must hold for our reading of All but One, and what must not."""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from linear_toy import CROSS, SELF, LinearToy
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.generator import Generator, State
from expunge.methods.finetune.all_but_one import AllButOne
from expunge.methods.finetune.esd import ESD
from expunge.models.load import load
from expunge.ops.student import Student
from expunge.ops.surgery import dot, project_conflict, surgical
from expunge.ops.trajectory import Goals, Lesson, Teach, Walk, predict_each, uncond_drift

TOY = LinearToy.seeded()
SHORT = {"group": "cross_attention", "steps": 8, "pool": 6, "walk": 4, "batch": 2, "lr": 1e-3}
LONG = {"steps": 250, "pool": 6, "walk": 4, "batch": 3, "lr": 1e-2}
LONGER = {**LONG, "steps": 800}  # several concepts at once
PENALTY = {"constraint": "penalty"}
CAT, CAT_TO_DOG = Request.of("cat"), Request.of("cat", anchor="dog")
FORMS = ("penalty", "projection", "lagrangian")


def train(
    method: AllButOne | ESD, request: Request = CAT_TO_DOG, model: Generator = TOY
) -> tuple[Generator, dict[str, list[float]]]:
    log = defaultdict(list)
    patch = method.erase(model, request, Run(log=lambda name, step, value: log[name].append(value)))
    return patch.on(model), log


def embedding(word: str) -> Tensor:
    return TOY.encode([word]).subject[0]


def probe(model: Generator, prompt: str = "cat") -> State:
    cond = model.encode([prompt] * 8)
    return model.visit(cond, rng=Run().rng("probe"), guidance_scale=3.0, steps=8)


def drift(edited: Generator, model: Generator) -> float:
    return float(uncond_drift(edited, model, probe(model)).mean())


def descend(loss: Callable[[Generator, Lesson], Tensor], teach: Teach, steps: int) -> Tensor:
    """Train another paper's loss on the states the method makes of SHORT, with a plain Adam; gives the cross weight."""
    walk = Walk(prompts=TOY.encode(["cat"]), batch=2, guidance_scale=3.0, steps=4)
    lesson = walk.pooled(TOY, teach, Run(), size=SHORT["pool"])
    student = Student.of(TOY, "cross_kv")
    optimizer = torch.optim.Adam(student.parameters, lr=SHORT["lr"])
    for step in range(steps):
        optimizer.zero_grad()
        loss(student.view(), lesson(step)).backward()
        optimizer.step()
    return student.patch().on(TOY).weight(CROSS)


@pytest.mark.parametrize("constraint", FORMS)
@pytest.mark.parametrize("through", [False, True])
def test_alternative_that_reads_as_the_target_changes_nothing(constraint: str, through: bool) -> None:
    toy = LinearToy(network=TOY.network, aliases={"feline": "cat"})
    method = AllButOne(constraint=constraint, grad_through_uncond=through, **{**SHORT, "group": "all"})
    same, log = train(method, Request.of("cat", anchor="feline"), toy)
    assert max(log["loss"]) < 1e-25 and max(log["grad_norm"]) < 1e-12
    assert same.weights_equal(TOY)
    other, _ = train(method, CAT_TO_DOG, toy)
    assert not other.weights_equal(TOY)


def test_drift_term_is_silent_at_the_start_whatever_its_weight_and_speaks_later() -> None:
    free, held = (train(AllButOne(**PENALTY, drift_weight=weight, **SHORT))[1] for weight in (0.0, 50.0))
    assert free["drift"][0] == held["drift"][0] == 0
    assert free["loss"][0] == held["loss"][0]
    assert free["grad_norm"][0] == held["grad_norm"][0]
    assert free["grad_norm"][4] != held["grad_norm"][4]
    assert free["drift"][-1] > 0


def test_vanishing_guidance_without_constraint_is_sdd_without_its_moving_average() -> None:
    """‖eps_student(c) − sg eps_student("")‖²: the same weights after every step."""

    def sdd(view: Generator, now: Lesson) -> Tensor:
        u, c = predict_each(view, now.state, [TOY.encode([word] * 2) for word in ("", "cat")])
        return TOY.distance(c, u.detach()).mean()

    def nothing(state: State, which: Tensor) -> Goals:
        return ()

    theirs = descend(sdd, nothing, 8)
    stopped = {**SHORT, **PENALTY, "drift_weight": 0.0, "group": "cross_kv"}
    ours = AllButOne(strength=0.0, grad_through_uncond=False, **stopped)
    torch.testing.assert_close(train(ours, CAT)[0].weight(CROSS), theirs, rtol=0, atol=1e-7)
    for other in (
        AllButOne(strength=0.5, grad_through_uncond=False, **stopped),
        AllButOne(strength=0.0, grad_through_uncond=True, **stopped),
    ):
        assert (train(other, CAT)[0].weight(CROSS) - theirs).abs().max() > 1e-5


def test_alternative_without_constraint_is_concept_ablation_until_the_unconditional_part_moves() -> None:
    """‖eps_student(c) − eps(anchor)‖² differs from the first term by eps_student("") − eps("") inside the norm."""

    def ablate(view: Generator, now: Lesson) -> Tensor:
        return TOY.distance(view.predict(now.state, TOY.encode(["cat"] * 2)), now.goals[0]).mean()

    def teach(state: State, which: Tensor) -> Goals:
        return (TOY.predict(state, TOY.encode(["dog"] * len(which))),)

    def ours(steps: int) -> Tensor:
        brief = {**SHORT, "steps": steps, "group": "cross_kv"}
        method = AllButOne(**PENALTY, drift_weight=0.0, grad_through_uncond=False, **brief)
        return train(method)[0].weight(CROSS)

    torch.testing.assert_close(ours(1), descend(ablate, teach, 1), rtol=0, atol=1e-7)
    assert (ours(8) - descend(ablate, teach, 8)).abs().max() > 1e-5


@pytest.mark.parametrize("through", [False, True])
def test_adding_one_field_to_both_predictions_only_shows_in_the_drift(through: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    u, c, u0, goal, shift = (torch.randn(3, 4, 2, 2, generator=rng, dtype=torch.float64) for _ in range(5))
    method = AllButOne(grad_through_uncond=through)
    wish, still = method.terms(TOY, (u0, c), (u0, goal))
    shifted, moved = method.terms(TOY, (u0 + shift, c + shift), (u0, goal))
    torch.testing.assert_close(shifted, wish)
    torch.testing.assert_close(moved, shift.square().mean())
    assert still == 0
    only_one, _ = method.terms(TOY, (u, c + shift), (u0, goal))
    assert not torch.isclose(only_one, method.terms(TOY, (u, c), (u0, goal))[0])


def test_first_term_reaches_the_unconditional_branch_only_through_the_flag() -> None:
    for through in (False, True):
        u, c = (torch.ones(1, 4, 2, 2, dtype=torch.float64) * value for value in (0.5, 2.0))
        u.requires_grad_(), c.requires_grad_()
        wish, _ = AllButOne(grad_through_uncond=through).terms(TOY, (u, c), (torch.zeros_like(u), torch.zeros_like(u)))
        slope = torch.autograd.grad(wish, [u, c], allow_unused=True)
        assert (slope[0] is not None) == through
        assert slope[1] is not None and slope[1].norm() > 0


def test_projected_gradient_never_works_against_the_guarded_loss() -> None:
    rng, conflicts = torch.Generator().manual_seed(2), 0
    for _ in range(50):
        u, v = ([torch.randn(3, 4, generator=rng), torch.randn(5, generator=rng)] for _ in range(2))
        projected = project_conflict(u, v)
        if dot(u, v) < 0:
            conflicts += 1
            assert dot(projected, v) > -1e-6 * dot(v, v)
        else:
            assert all(torch.equal(a, b) for a, b in zip(projected, u, strict=True))
    assert 10 < conflicts < 40
    zero = [torch.zeros(3, 4), torch.zeros(5)]
    assert all(torch.equal(a, b) for a, b in zip(project_conflict(u, zero), u, strict=True))


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_surgical_loss_has_the_sums_value_and_the_projected_gradient(weight: float) -> None:
    p = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    wish, guard = -p[0] + 3 * p[1], p.square().sum() / 2  # slopes (−1, 3) and (1, 2): no conflict
    torch.testing.assert_close(surgical(wish, guard, [p], weight), wish + weight * guard)
    agreed = torch.autograd.grad(surgical(wish, guard, [p], weight), p)[0]
    torch.testing.assert_close(agreed, torch.autograd.grad(wish + weight * guard, p, retain_graph=True)[0])
    against = -p.sum()  # slope (−1, −1) against (1, 2): −3/5 of it goes
    turned = torch.autograd.grad(surgical(against, guard, [p], weight), p)[0]
    v = p.detach()
    torch.testing.assert_close(turned, torch.tensor([-0.4, 0.2], dtype=torch.float64) + weight * v)
    assert (turned - (-1 + weight * v)).norm() > 0.1
    assert turned @ v >= -1e-12


def test_stated_minimiser_of_the_linear_model_has_zero_loss_and_training_finds_it() -> None:
    """A and B e("") stay, B e(target) becomes the old B e(anchor); with the constraint off B e("") goes."""
    e0, ec, ea, old = embedding(""), embedding("cat"), embedding("dog"), TOY.weight(CROSS)
    reads = torch.linalg.pinv(torch.stack([ec, e0], dim=1))[0]  # 1 on the target, 0 on the empty prompt
    best = TOY.view(weights={CROSS: old + torch.outer(old @ (ea - ec), reads)})
    state = probe(TOY)
    conds = [TOY.encode([word] * 8) for word in ("", "cat", "dog")]
    u0, _, a0 = predict_each(TOY, state, conds)
    u, c, _ = predict_each(best, state, conds)
    wish, held = AllButOne().terms(TOY, (u, c), (u0, a0 - u0))
    assert wish < 1e-25 and held < 1e-25
    other_a = best.view(weights={SELF: TOY.weight(SELF) * 1.01})
    u, c, _ = predict_each(other_a, state, conds)
    assert AllButOne().terms(TOY, (u, c), (u0, a0 - u0))[1] > 1e-6

    edited, _ = train(AllButOne(group="cross_kv", **LONG))
    torch.testing.assert_close(edited.weight(CROSS) @ ec, old @ ea, rtol=0, atol=1e-4)
    torch.testing.assert_close(edited.weight(CROSS) @ e0, old @ e0, rtol=0, atol=1e-4)
    free, _ = train(AllButOne(**PENALTY, group="cross_kv", drift_weight=0.0, **LONG))
    assert (free.weight(CROSS) @ e0 - old @ e0).abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_at_zero_loss_the_guided_prediction_is_the_anchors_at_every_scale(scale: float) -> None:
    edited, _ = train(AllButOne(group="cross_kv", **LONG))
    state, eight = probe(TOY), 8
    u, c = predict_each(edited, state, [TOY.encode([word] * eight) for word in ("", "cat")])
    u0, a0, c0 = predict_each(TOY, state, [TOY.encode([word] * eight) for word in ("", "dog", "cat")])
    torch.testing.assert_close(u + scale * (c - u), u0 + scale * (a0 - u0), rtol=0, atol=1e-2)
    if scale:
        assert (u + scale * (c - u) - u0 - scale * (c0 - u0)).abs().max() > 0.1


def test_no_alternative_turns_the_guidance_round_and_both_kinds_may_be_mixed() -> None:
    both = Request(target=(Concept.of("cat"), Concept.of("bird")), anchor=(None, Concept.of("dog")))
    edited, _ = train(AllButOne(group="cross_kv", strength=0.5, **LONGER), both)
    e0, old, new = embedding(""), TOY.weight(CROSS), edited.weight(CROSS)

    def guidance(weight: Tensor, word: str) -> Tensor:
        return weight @ (embedding(word) - e0)

    torch.testing.assert_close(guidance(new, "cat"), -0.5 * guidance(old, "cat"), rtol=0, atol=1e-2)
    torch.testing.assert_close(guidance(new, "bird"), guidance(old, "dog"), rtol=0, atol=1e-2)
    assert (guidance(new, "cat") + guidance(old, "cat")).abs().max() > 0.1


def test_retained_guidance_is_held_only_if_asked() -> None:
    keep = Request.of("cat", anchor="dog", retain=["red cat", "tabby cat"])

    def moved(weight: float) -> float:
        edited, _ = train(AllButOne(group="cross_kv", retain_weight=weight, **LONGER), keep)
        change = edited.weight(CROSS) - TOY.weight(CROSS)
        return max(float((change @ (embedding(word) - embedding(""))).norm()) for word in ("red cat", "tabby cat"))

    assert moved(1.0) < 0.02 < moved(0.0)


def test_constraint_lowers_the_drift_on_a_unet() -> None:
    model, request = load("tiny-unet"), Request.of("strawberry", anchor="dog")
    brief = {"group": "cross_attention", "steps": 15, "pool": 6, "walk": 4, "batch": 3, "lr": 1e-3}

    def after(**fields: object) -> float:
        return drift(train(AllButOne(**{**brief, **fields}), request, model)[0], model)

    free, held = (after(**PENALTY, drift_weight=weight) for weight in (0.0, 10.0))
    assert held < 0.5 * free
    assert after(**PENALTY, drift_weight=0.0, grad_through_uncond=False) > 2 * free
    assert after(constraint="projection", drift_weight=1.0) < free
    tight, loose = (after(constraint="lagrangian", drift_weight=0.0, drift_budget=budget) for budget in (0.0, 1e9))
    assert loose == free
    assert tight < free
    assert after() < after(**PENALTY)  # a multiplier that rises from the weight that the other keeps
    esd = train(ESD(**brief), request, model)[0]
    assert drift(esd, model) > held


def test_prompt_layers_cannot_drift_where_the_empty_prompt_is_zeros() -> None:
    """SDXL encodes "" as zeros: keys and values of it are zero under any weights, on SD types they are not."""
    method = AllButOne(**PENALTY, drift_weight=0.0, **{**SHORT, "group": "cross_kv"})
    for name, moves in (("tiny-sdxl", False), ("tiny-unet", True)):
        model = load(name)
        edited, log = train(method, Request.of("strawberry", anchor="dog"), model)
        assert (drift(edited, model) > 0) == moves
        assert (max(log["drift"]) > 0) == moves


def test_it_says_that_it_is_a_reconstruction_and_esd_does_not() -> None:
    assert AllButOne.reconstruction and not ESD.reconstruction
    assert AllButOne.__doc__ is not None and AllButOne.__doc__.startswith("Reconstruction")
