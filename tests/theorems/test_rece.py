"""What must hold for RECE, and what must not."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_toy import CROSS, LinearToy, deltas
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.methods.closed_form.rece import RECE
from expunge.methods.closed_form.uce import UCE
from expunge.models.load import load
from expunge.ops.ridge import output_gram, residual_rows, shared_edit
from expunge.patches.operator import SharedEdit

F64 = torch.float64
TOY = LinearToy.seeded()
START = {"start_ridge": 0.5, "start_retain_weight": 1.0}
SETTINGS = {**START, "ridge": 0.1, "retain_weight": 0.1, "penalty": 0.1, "epochs": 1}
WIDTH = 12


def ask(*prompts: str, to: str | None = "dog", keep: Sequence[str] = ()) -> Request:
    target = tuple(Concept.of(prompt) for prompt in prompts)
    anchor = None if to is None else Concept.of(to)
    return Request(target=target, anchor=(anchor,) * len(target), retain=tuple(Concept.of(word) for word in keep))


def weight(method: RECE | UCE, request: Request, toy: LinearToy = TOY) -> Tensor:
    old = toy.weight(CROSS)
    return old + deltas(method.erase(toy, request, Run()), toy).get(CROSS, torch.zeros_like(old))


def rece(**words: Any) -> RECE:
    return RECE(**{**SETTINGS, **words})


def tail(prompt: str) -> Tensor:
    """Rows from the last word on, written here without the library's helpers."""
    return TOY.encode([prompt]).tokens[0, len(prompt.split()) :]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor, SharedEdit]:
    """Layers of unequal height, target rows, anchor rows, and an edit from one to the other."""
    weights = [0.4 * randn(seed + i, out, WIDTH) for i, out in enumerate((5, 9, 14))]
    c, goal, held = randn(seed + 3, 4, WIDTH), randn(seed + 4, 4, WIDTH), randn(seed + 5, 6, WIDTH)
    return weights, c, goal, shared_edit(c, goal, torch.ones(4), held, torch.ones(6), 0.5)


def residual(new: Sequence[Tensor], old: Sequence[Tensor], rows: Tensor, penalty: float, pull: Tensor) -> Tensor:
    """The same embedding by plain least squares, layers and penalty stacked below each other: no d x d product."""
    stack = torch.cat([*new, penalty**0.5 * torch.eye(rows.shape[1], dtype=F64)])
    goals = torch.cat([*(rows @ w.T for w in old), penalty**0.5 * pull], dim=1)
    return torch.linalg.lstsq(stack, goals.T, driver="gelsd").solution.T


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("pulled", [False, True])
def test_residual_equals_least_squares_over_all_layers(penalty: float, pulled: bool) -> None:
    weights, c, goal, edit = problem()
    new = [w + edit.delta(w) for w in weights]
    found = residual_rows(c, output_gram(weights), edit, penalty, goal if pulled else None)
    plain = residual(new, weights, c, penalty, goal if pulled else torch.zeros_like(c))
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)
    # normal equations, (lam I + sum W^T W) c' = sum W^T W0 c + lam c*, and they are not met by c itself
    inner = penalty * torch.eye(WIDTH, dtype=F64) + sum(w.T @ w for w in new)
    right = sum(c @ w0.T @ w for w0, w in zip(weights, new, strict=True)) + penalty * (goal if pulled else 0 * goal)
    torch.testing.assert_close(found @ inner, right, rtol=1e-10, atol=1e-10)
    assert (c @ inner - right).norm() > 1e-2


@pytest.mark.parametrize("pulled", [False, True])
def test_every_other_embedding_is_worse(pulled: bool) -> None:
    weights, c, goal, edit = problem(20)
    new, pull = torch.cat([w + edit.delta(w) for w in weights]), goal if pulled else torch.zeros_like(c)
    best = residual_rows(c, output_gram(weights), edit, 0.1, goal if pulled else None)

    def cost(e: Tensor) -> Tensor:
        return (e @ new.T - c @ torch.cat(weights).T).square().sum(-1) + 0.1 * (e - pull).square().sum(-1)

    for size in (1e-3, 1.0):
        assert bool((cost(best + size * randn(7, 200, *c.shape)) > cost(best)).all())
    wrong = residual_rows(c, output_gram(weights), edit, 1.0, goal if pulled else None)
    assert bool((cost(wrong) > cost(best) + 1e-6).all())


def test_before_any_edit_the_residual_is_the_row_itself_or_shrunk() -> None:
    weights, c, _, edit = problem(30)
    none = SharedEdit(moves=0 * edit.moves, duals=edit.duals)
    gram = output_gram(weights)
    torch.testing.assert_close(residual_rows(c, gram, none, 0.0), c, rtol=1e-9, atol=1e-9)
    shrunk = residual_rows(torch.eye(WIDTH, dtype=F64), gram, none, 0.1)
    torch.testing.assert_close(shrunk, torch.linalg.solve(gram + 0.1 * torch.eye(WIDTH, dtype=F64), gram).T)
    values = torch.linalg.eigvals(shrunk).real
    assert values.min() > 0 and values.max() < 1
    assert (residual_rows(c, gram, edit, 0.0) - c).norm() > 1e-1


def test_without_penalty_the_residual_gives_every_layer_what_it_gave() -> None:
    weights, c, _, edit = problem(40)
    e = residual_rows(c, output_gram(weights), edit, 0.0)
    for w in weights:
        torch.testing.assert_close(e @ (w + edit.delta(w)).T, c @ w.T, rtol=1e-8, atol=1e-8)
    bent = residual_rows(c, output_gram(weights), edit, 0.1)
    assert (bent @ (weights[0] + edit.delta(weights[0])).T - c @ weights[0].T).norm() > 1e-2
    with pytest.raises(InputError, match=r"penalty -0\.1 must not be negative"):
        residual_rows(c, output_gram(weights), edit, -0.1)


def test_edits_one_after_the_other_are_one_edit() -> None:
    weights, c, goal, first = problem(50)
    second = shared_edit(goal, c + 1, torch.ones(4), c[:0], torch.ones(0), 0.3)
    both = first.then(second)
    for w in weights:
        between = w + first.delta(w)
        torch.testing.assert_close(w + both.delta(w), between + second.delta(between), rtol=1e-10, atol=1e-10)
    turned = second.then(first)
    assert (turned.matrix() - both.matrix()).norm() > 1e-2  # the order matters
    torch.testing.assert_close(both.matrix(), first.matrix() @ second.matrix(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-sd3"])
def test_no_epoch_is_uce_and_one_is_not(name: str) -> None:
    model, request = load(name), Request.of("strawberry", anchor="cat", retain=("car",))
    plain = deltas(UCE(retain_weight=1.0, ridge=0.5).erase(model, request, Run()), model)
    start = deltas(RECE(epochs=0, **START).erase(model, request, Run()), model)
    assert plain.keys() == start.keys() == {site.path for site in model.sites("text_in")}
    assert all(torch.equal(plain[path], start[path]) for path in plain)
    one = deltas(rece().erase(model, request, Run()), model)
    assert all(not torch.equal(plain[path], one[path]) for path in plain)


@pytest.mark.parametrize("pull", ["zero", "anchor"])
@pytest.mark.parametrize("rows", ["tail", "word", "window"])
def test_two_epochs_equal_a_loop_over_layers(pull: str, rows: str) -> None:
    """Against loops that know no common operator: every layer solved for itself, with an explicit inverse."""
    model = load("tiny-unet")
    request = Request.of("strawberry", anchor="cat", retain=("car",))
    method = rece(epochs=2, pull=pull, rows=rows)
    old = {site.path: site.weight.double() for site in model.sites("text_in")}
    delta = deltas(UCE(retain_weight=1.0, ridge=0.5).erase(model, request, Run()), model)
    new = {path: w + delta[path].double() for path, w in old.items()}
    texts = model.encode(["strawberry", "cat", "", "car"])
    (c, goal), held = texts.tokens[:2].double(), texts.tokens[2:].double().flatten(0, 1)
    last = int(texts.last[0])
    assert last == int(texts.last[1])
    cut = {"tail": slice(last, None), "word": slice(last, last + 1), "window": slice(None)}[rows]
    c, goal = c[cut], goal[cut]
    for _ in range(2):
        pulled = goal if pull == "anchor" else torch.zeros_like(goal)
        e = residual(list(new.values()), list(old.values()), c, 0.1, pulled)
        d = 0.1 * torch.eye(e.shape[1], dtype=F64) + e.T @ e + 0.1 * held.T @ held
        for path, w in new.items():
            top = 0.1 * w + (goal @ w.T).T @ e + 0.1 * (held @ w.T).T @ held
            new[path] = top @ torch.linalg.inv(d)
    found = deltas(method.erase(model, request, Run()), model)
    for path, w in old.items():  # UCE's deltas are stored in float32, which is all that parts them
        torch.testing.assert_close(w + found[path].double(), new[path], rtol=0, atol=2e-5 * float(new[path].norm()))
    other = deltas(
        rece(epochs=2, pull="anchor" if pull == "zero" else "zero", rows=rows).erase(model, request, Run()), model
    )
    assert any((other[path] - found[path]).norm() > 1e-3 * found[path].norm() for path in old)


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_every_epoch_makes_the_way_back_dearer(penalty: float) -> None:
    """min over e of |W'e - W c|^2 + penalty |e|^2, summed over the target's rows."""
    old, c = TOY.weight(CROSS), tail("cat")

    def price(method: RECE, rows: Tensor = c) -> float:
        new = weight(method, ask("cat", keep=["car"]))
        e = residual([new], [old], rows, penalty, torch.zeros_like(rows))
        return float((e @ new.T - rows @ old.T).square().sum() + penalty * e.square().sum())

    prices = [price(rece(epochs=epochs, penalty=penalty)) for epochs in range(4)]
    assert prices == sorted(prices)
    assert prices[1] > 1.1 * prices[0]
    # of what is retained the price stays as it was, nearly
    kept = TOY.encode(["car"]).tokens[0]
    strict = {"retain_weight": 1e6, "start_retain_weight": 1e6}
    assert price(rece(epochs=3, penalty=penalty, **strict), kept) == pytest.approx(
        price(rece(strength=0.0), kept), rel=1e-2
    )


def test_an_epoch_brings_the_residual_nearer_to_the_anchor() -> None:
    old, c, goal = TOY.weight(CROSS), tail("cat"), tail("dog")
    before = weight(rece(epochs=0), ask("cat"))
    after = weight(rece(epochs=1), ask("cat"))
    e = residual([before], [old], c, 0.1, torch.zeros_like(c))

    def miss(now: Tensor) -> float:
        return float((e @ now.T - goal @ before.T).norm())

    assert miss(after) < 0.2 * miss(before)
    assert miss(weight(rece(strength=1e-6), ask("cat"))) > 0.2 * miss(before)


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_nothing_asked_changes_nothing(epochs: int) -> None:
    request = ask("cat", keep=["car"])
    assert deltas(rece(epochs=epochs, strength=0.0).erase(TOY, request, Run()), TOY) == {}
    assert deltas(rece(epochs=epochs, strength=1e-3).erase(TOY, request, Run()), TOY) != {}


def test_anchor_that_reads_as_the_target_changes_nothing_only_if_the_residual_is_drawn_to_it() -> None:
    """With W' = W the pulled residual is c itself; the paper's penalty finds it shorter, and that is moved to c."""
    toy = LinearToy(network=TOY.network, aliases={"feline": "cat"})

    def moved(to: str, **words: Any) -> float:
        return float((weight(rece(**words), ask("cat", to=to), toy) - toy.weight(CROSS)).norm())

    assert moved("feline", pull="anchor") < 1e-10
    assert moved("feline", epochs=0) == 0.0
    assert moved("feline", penalty=1e-9) < 1e-6
    assert moved("feline", pull="zero") > 1e-2
    assert moved("dog", pull="anchor") > 1e-2


def test_pull_matters_with_a_penalty_only() -> None:
    def apart(penalty: float) -> float:
        one, two = (weight(rece(pull=pull, penalty=penalty), ask("cat")) for pull in ("zero", "anchor"))
        return float((one - two).norm())

    assert apart(0.1) > 1e-2
    assert apart(1e-10) < 1e-6


@pytest.mark.parametrize("word", ["car", ""])
def test_retained_rows_move_less_with_their_weight(word: str) -> None:
    p, start = TOY.encode([word]).tokens[0], weight(rece(epochs=0), ask("cat", keep=["car"]))

    def moved(retain_weight: float) -> float:
        new = weight(rece(epochs=2, retain_weight=retain_weight), ask("cat", keep=["car"]))
        return float((p @ (new - start).T).norm())

    found = [moved(w) for w in (1e-2, 1.0, 1e2, 1e8)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 1e-2 and found[-1] < 1e-6


def test_rece_is_undone_by_the_inverse_as_uce_is() -> None:
    """Honest: M stays regular. Only the embeddings that undo it are longer."""
    old, c = TOY.weight(CROSS), tail("cat")

    def inverse(method: RECE) -> tuple[float, float]:
        new = weight(method, ask("cat"))
        m = torch.linalg.lstsq(old, new).solution
        e = torch.linalg.solve(m, c.T).T
        return float((e @ new.T - c @ old.T).norm() / (c @ old.T).norm()), float(e.norm())

    found = [inverse(rece(epochs=epochs)) for epochs in (0, 1, 3)]
    assert max(miss for miss, _ in found) < 1e-6
    assert found[0][1] < found[1][1] < found[2][1]


def test_both_routes_of_an_mmdit_are_alternated() -> None:
    model = load("tiny-flux")
    sites = {site.path: site.reads for site in model.sites("text_in")}
    assert set(sites.values()) == {"tokens", "pooled"}
    request = Request.of("strawberry", anchor="cat")
    zero, one = (deltas(rece(epochs=epochs).erase(model, request, Run()), model) for epochs in (0, 1))
    for path, route in sites.items():
        assert not torch.equal(zero[path], one[path]), route


def test_several_concepts_are_erased_in_one_step_and_their_order_does_not_matter() -> None:
    both, turned = weight(rece(), ask("cat", "red bird")), weight(rece(), ask("red bird", "cat"))
    torch.testing.assert_close(both, turned, rtol=1e-9, atol=1e-10)
    assert (both - weight(rece(), ask("cat"))).norm() > 1e-2


def test_bad_settings_are_one_line() -> None:
    with pytest.raises(InputError, match="epochs is -1; legal: 0 or more") as caught:
        weight(rece(epochs=-1), ask("cat"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="must not be negative"):
        weight(rece(penalty=-0.1), ask("cat"))
    with pytest.raises(InputError, match="must not be negative"):
        weight(rece(ridge=-1.0), ask("cat"))


def test_it_reports_its_epochs_and_whether_anything_is_retained() -> None:
    seen: list[tuple[str, int, int]] = []
    rece(epochs=2).erase(TOY, ask("cat"), Run(progress=lambda *step: seen.append(step)))
    assert seen == [("epochs", 1, 2), ("epochs", 2, 2)]
    none = rece(retain_weight=0.0, start_retain_weight=0.0)
    assert rece().retains and replace(none, retain_weight=0.1).retains and not none.retains
    assert not replace(none, retain_weight=0.1, epochs=0).retains
