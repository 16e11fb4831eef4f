"""What must hold for the closed-form edit, and what must not."""

from collections.abc import Sequence

import pytest
import torch
from linear_toy import CROSS, LinearToy, deltas
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.methods.closed_form.uce import UCE
from expunge.models.load import load
from expunge.stages.erase import check

MODES = ("uce2023", "uce2025")
TOY = LinearToy.seeded()


def ask(*prompts: str, to: str | None = "dog", keep: Sequence[str] = ()) -> Request:
    target = tuple(Concept.of(prompt) for prompt in prompts)
    anchor = None if to is None else Concept.of(to)
    return Request(target=target, anchor=(anchor,) * len(target), retain=tuple(Concept.of(word) for word in keep))


def delta(method: UCE, request: Request) -> Tensor:
    found = deltas(method.erase(TOY, request, Run()), TOY)
    return found.get(CROSS, torch.zeros_like(TOY.weight(CROSS)))


def rows(prompt: str, mode: str, length: int | None = None) -> Tensor:
    """The rows the spec takes of a prompt, written here without the library's helpers."""
    cond = TOY.encode([prompt])
    last = len(prompt.split())
    return cond.tokens[0, last : last + 1] if mode == "uce2025" else cond.tokens[0, last:][:length]


def objective(weight: Tensor, method: UCE, pairs: Sequence[tuple[str, str]], keep: Sequence[str]) -> Tensor:
    """The sum of squares that the docstring of UCE says is minimized."""
    old = TOY.weight(CROSS)
    total = method.ridge * (weight - old).square().sum()
    for target, anchor in pairs:
        length = TOY.window - max(len(target.split()), len(anchor.split()))
        c, g = rows(target, method.mode, length), rows(anchor, method.mode, length)
        total = total + method.strength * (c @ weight.T - g @ old.T).square().sum()
    held = ["", *keep] if method.mode == "uce2023" else keep
    for prompt in held:
        p = TOY.encode([prompt]).tokens[0] if method.mode == "uce2023" else rows(prompt, method.mode)
        weight_of_it = method.retain_weight if method.retain_weight is not None else 1.0
        total = total + weight_of_it * (p @ weight.T - p @ old.T).square().sum()
    return total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("strength", "retain_weight", "ridge"), [(1.0, 1.0, 0.5), (7.0, 0.1, 1e-3)])
def test_anchor_that_reads_as_the_target_changes_nothing(
    mode: str, strength: float, retain_weight: float, ridge: float
) -> None:
    toy = LinearToy(network=TOY.network, aliases={"feline": "cat"})
    method = UCE(mode=mode, strength=strength, retain_weight=retain_weight, ridge=ridge)
    assert deltas(method.erase(toy, ask("cat", to="feline"), Run()), toy) == {}
    assert deltas(method.erase(toy, ask("cat", to="dog"), Run()), toy) != {}


@pytest.mark.parametrize("mode", MODES)
def test_strength_zero_changes_nothing_whatever_is_retained(mode: str) -> None:
    for weight in (0.1, 10.0):
        method = UCE(mode=mode, strength=0.0, retain_weight=weight)
        assert deltas(method.erase(TOY, ask("cat", keep=["car"]), Run()), TOY) == {}
    assert delta(UCE(mode=mode, strength=0.1, ridge=0.5), ask("cat")).norm() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_change_vanishes_as_one_over_ridge(mode: str) -> None:
    def ratio(ridge: float) -> float:
        small, large = (delta(UCE(mode=mode, ridge=r), ask("cat")).norm() for r in (ridge, 10 * ridge))
        return float(small / large)

    assert ratio(1e6) == pytest.approx(10, rel=1e-3)
    assert ratio(1e-2) < 5


@pytest.mark.parametrize("method", [UCE(mode="uce2023", retain_weight=0.7, ridge=0.5), UCE(mode="uce2025", ridge=0.03)])
def test_solution_is_stationary_for_the_stated_objective(method: UCE) -> None:
    pairs, keep = [("red cat", "dog"), ("bird", "dog")], ["car", "blue car"]
    request = ask("red cat", "bird", keep=keep)
    old = TOY.weight(CROSS)

    def slope(weight: Tensor) -> Tensor:
        point = weight.clone().requires_grad_()
        return torch.autograd.grad(objective(point, method, pairs, keep), point)[0]

    assert slope(old + delta(method, request)).norm() < 1e-10 * slope(old).norm()
    assert slope(old).norm() > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_without_ridge_and_retention_every_row_lands_on_its_anchor(mode: str) -> None:
    old, c, g = TOY.weight(CROSS), rows("cat", mode), rows("dog", mode)

    def miss(ridge: float) -> float:
        new = old + delta(UCE(mode=mode, ridge=ridge, retain_weight=0.0), ask("cat"))
        return float((c @ new.T - g @ old.T).norm() / (c @ old.T - g @ old.T).norm())

    assert miss(1e-9) < 1e-6
    assert miss(1.0) > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_large_retain_weight_holds_retained_outputs(mode: str) -> None:
    p = rows("car", mode)

    def moved(weight: float) -> float:
        change = delta(UCE(mode=mode, retain_weight=weight, ridge=0.5), ask("cat", keep=["car"]))
        return float((p @ change.T).norm() / (p @ TOY.weight(CROSS).T).norm())

    assert moved(1e10) < 1e-8
    assert moved(1e-3) > 1e-3


def test_rank_is_at_most_the_number_of_erased_rows() -> None:
    one, two = ask("cat"), ask("cat", "bird")
    assert torch.linalg.matrix_rank(delta(UCE(mode="uce2025", ridge=0.5), one)) == 1
    assert torch.linalg.matrix_rank(delta(UCE(mode="uce2025", ridge=0.5), two)) == 2
    assert torch.linalg.matrix_rank(delta(UCE(mode="uce2023", ridge=0.5), one)) == TOY.window - 1


@pytest.mark.parametrize("mode", MODES)
def test_order_and_splitting_of_concepts_do_not_matter_but_their_weight_does(mode: str) -> None:
    method, half = UCE(mode=mode, ridge=0.5), UCE(mode=mode, strength=0.5, ridge=0.5)
    whole = delta(method, ask("cat", "red bird", keep=["car", "cup"]))
    turned = delta(method, ask("red bird", "cat", keep=["cup", "car"]))
    torch.testing.assert_close(whole, turned, rtol=1e-10, atol=1e-13)
    twice = Request(target=(Concept(name="cat", prompts=("cat", "cat")),), anchor=(Concept.of("dog"),))
    torch.testing.assert_close(delta(half, twice), delta(method, ask("cat")), rtol=1e-10, atol=1e-13)
    assert (delta(method, twice) - delta(method, ask("cat"))).norm() > 1e-3


def test_all_layers_share_one_operator_unless_the_technique_is_tensor() -> None:
    model = load("tiny-unet")

    def misfit(method: UCE) -> float:
        edited = method.erase(model, Request.of("strawberry", anchor="cat"), Run()).on(model)
        old = torch.cat([site.weight for site in model.sites("text_in")]).double()
        new = torch.cat([site.weight for site in edited.sites("text_in")]).double()
        assert old.shape[0] > 2 * old.shape[1]  # many more equations than unknowns: a fit is no accident
        operator = torch.linalg.lstsq(old, new).solution
        return float((old @ operator - new).norm() / (new - old).norm())

    assert misfit(UCE(ridge=0.5)) < 1e-5
    assert misfit(UCE(technique="tensor", ridge=0.5)) > 1e-2


def test_tensor_technique_takes_the_targets_own_output_out_of_the_goal() -> None:
    """Where the rows can all be met, what they now give has no component along what they gave."""
    method = UCE(technique="tensor", ridge=1e-9, retain_weight=0.0)
    old, c = TOY.weight(CROSS), rows("cat", "uce2023")
    before = c @ old.T

    def along(change: Tensor) -> float:
        after = c @ (old + change).T
        return abs(float((after * before).sum() / (after.norm() * before.norm())))

    assert along(delta(method, ask("cat"))) < 1e-6
    assert along(delta(UCE(ridge=1e-9, retain_weight=0.0), ask("cat"))) > 1e-2
    with pytest.raises(InputError, match="uce2025"):
        delta(UCE(mode="uce2025", technique="tensor", ridge=0.5), ask("cat"))


def test_no_anchor_is_the_empty_prompt_and_the_modes_are_different_algorithms() -> None:
    void = delta(UCE(ridge=0.5), ask("cat", to="void"))
    torch.testing.assert_close(delta(UCE(ridge=0.5), ask("cat", to=None)), void)
    assert (delta(UCE(ridge=0.5), ask("cat")) - void).norm() > 1e-3
    assert (delta(UCE(mode="uce2025", ridge=0.5), ask("cat")) - delta(UCE(ridge=0.5), ask("cat"))).norm() > 1e-3


def test_templates_edit_the_phrases_they_make() -> None:
    method = UCE(templates=("{}", "image of {}"), ridge=0.5)
    both = Request(
        target=(Concept(name="cat", prompts=("cat", "image of cat")),),
        anchor=(Concept(name="dog", prompts=("dog", "image of dog")),),
    )
    torch.testing.assert_close(delta(method, ask("cat")), delta(UCE(ridge=0.5), both))
    assert (delta(method, ask("cat")) - delta(UCE(ridge=0.5), ask("cat"))).norm() > 1e-3
    empty = Request(target=both.target, anchor=(None,))  # an empty anchor stays empty in every template
    torch.testing.assert_close(delta(method, ask("cat", to=None)), delta(UCE(ridge=0.5), empty))


def test_retain_weight_follows_the_authors_rule() -> None:
    few = ask("cat", keep=["car", "cup", "tree"])
    many = ask("cat", keep=[f"thing{i}" for i in range(20)])
    torch.testing.assert_close(delta(UCE(ridge=0.5), few), delta(UCE(retain_weight=0.25, ridge=0.5), few))
    torch.testing.assert_close(delta(UCE(ridge=0.5), many), delta(UCE(retain_weight=0.1, ridge=0.5), many))
    assert (delta(UCE(ridge=0.5), few) - delta(UCE(retain_weight=1.0, ridge=0.5), few)).norm() > 1e-3
    torch.testing.assert_close(
        delta(UCE(mode="uce2025", ridge=0.5), few), delta(UCE(mode="uce2025", retain_weight=1.0, ridge=0.5), few)
    )


def test_half_precision_weights_get_float32_deltas_and_keep_their_dtype() -> None:
    model = load("tiny-unet", dtype=torch.bfloat16)
    patch = UCE(ridge=0.5).erase(model, Request.of("strawberry", anchor="cat"), Run())
    assert {change.dtype for change in deltas(patch, model).values()} == {torch.float32}
    assert {site.weight.dtype for site in patch.on(model).sites("text_in")} == {torch.bfloat16}


def test_what_reads_as_a_target_is_refused_before_anything_is_solved() -> None:
    """Other letters, the same rows: no edit can move one and hold the other."""
    toy = LinearToy(network=TOY.network, aliases={"feline": "cat"})
    for request in (ask("cat", keep=("feline",)), ask("cat", "feline")):
        with pytest.raises(InputError, match=r"'cat' .*'feline'.* read the same to 'linear-toy'"):
            check(toy, "uce", UCE(), request)
    check(toy, "uce", UCE(), ask("cat", keep=("bird",)))
